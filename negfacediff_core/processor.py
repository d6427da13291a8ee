"""What this machine's processor offers this process."""

import os
from pathlib import Path

# Microseconds of processor time in each period, and the period, that a container may use (cgroups 2).
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return how many CPU cores this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, _QUOTA.read_text().split())
    except (OSError, ValueError):  # there is none: `max`, where a number could stand
        return cores
    return max(1, min(cores, quota // period))


def fast_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 in hardware: elsewhere it only costs time."""
    import torch

    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
