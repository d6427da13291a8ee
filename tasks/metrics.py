"""What Prometheus can ask a process that runs units.

Dask's workers serve it at `/metrics` of their dashboards' ports, beside Dask's own `dask_worker_*`. With the
executor threads, units run in the flow's process, which serves it where Prefect is told to:
PREFECT_CLIENT_METRICS_ENABLED=true, at the port PREFECT_CLIENT_METRICS_PORT (4201).
"""

import sys
import time
from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from negfacediff_core.errors import StoppedError
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.records import Record

# Prometheus adds `_total` to counters.
UNITS = Counter("negfacediff_units", "Units that ran to their end, by outcome.", ("stage", "outcome"))
IMAGES = Counter("negfacediff_images", "Images of committed units, ok or failed.", ("stage", "status"))
SECONDS = Histogram(
    "negfacediff_unit_seconds",
    "Seconds that a committed unit took.",
    ("stage",),
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
)
GPU_MEMORY = "negfacediff_gpu_memory_used_bytes"
GPU_UTILIZATION = "negfacediff_gpu_utilization_ratio"


def counted(spec: StageSpec, make: Callable[[], Record]) -> None:
    """Make a unit of a stage, and count it and its images."""
    began, clock = time.time(), time.perf_counter()
    try:
        record = make()
    except StoppedError:
        raise  # nobody waits for it: it has not failed
    except Exception:
        UNITS.labels(spec.name, "failed").inc()
        raise
    if record.started < began:
        return  # another worker had committed it
    UNITS.labels(spec.name, "committed").inc()
    SECONDS.labels(spec.name).observe(time.perf_counter() - clock)
    if spec.per_replicate:
        IMAGES.labels(spec.name, "ok").inc(record.ok)
        IMAGES.labels(spec.name, "failed").inc(record.failed)


class _Gpu(Collector):
    """Reads the GPU that this process works on whenever Prometheus asks; says nothing where there is none."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        memory = GaugeMetricFamily(
            GPU_MEMORY, "Memory of the GPU in use, by all processes.", labels=["device"]
        )
        ratio = GaugeMetricFamily(
            GPU_UTILIZATION, "Share of time in which the GPU was busy.", labels=["device"]
        )
        if (reading := _read_gpu()) is not None:
            device, used, busy = reading
            memory.add_metric([device], used)
            ratio.add_metric([device], busy)
        yield memory
        yield ratio


def _read_gpu() -> tuple[str, float, float] | None:
    """Return number, bytes in use and share of time busy, the last by NVML, which knows no process's view."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        return (
            str(pynvml.nvmlDeviceGetIndex(handle)),
            float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
            pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        )
    except Exception:  # no library, or a GPU that does not tell: each has an error of its own
        return None


REGISTRY.register(_Gpu())
