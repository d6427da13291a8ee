"""The energy that this machine's processors and GPUs use while a block runs, where they tell it.

Intel and AMD processors count it in `/sys/class/powercap` (on many systems readable by root alone), NVIDIA
GPUs through NVML, which comes with the extra `cuda`. It is that of the whole machine, whatever else it does.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
# Processors' counters wrap around, after a quarter of an hour at the earliest.
SECONDS_BETWEEN_READINGS = 60.0

Reading = Callable[[], float]
"""Returns joules since some moment."""


class Energy:
    """What has been used so far: `joules`, None where nothing here tells."""

    def __init__(self) -> None:
        self._counters = [*processors(), *gpus()]
        self._last = [counter() for counter, _ in self._counters]
        self._used = 0.0

    def read(self) -> None:
        """Add what was used since the last reading; a counter that has gone leaves no figure at all."""
        try:
            readings = [counter() for counter, _ in self._counters]
        except Exception:  # files and the NVML have errors of their own; the work goes on without
            self._counters = []
        for number, (_, wraps_at) in enumerate(self._counters):
            used = readings[number] - self._last[number]
            self._used += used % wraps_at if wraps_at else used
        self._last = readings if self._counters else []

    @property
    def joules(self) -> float | None:
        """Energy up to the last reading."""
        return self._used if self._counters else None


@contextmanager
def measured() -> Iterator[Energy]:
    """Yield a meter that is read now and then, and when the block ends."""
    energy, ended = Energy(), threading.Event()

    def read_on() -> None:
        while not ended.wait(SECONDS_BETWEEN_READINGS):
            energy.read()

    reader = threading.Thread(target=read_on, name="energy", daemon=True)
    reader.start()
    try:
        yield energy
    finally:
        ended.set()
        reader.join()
        energy.read()


def processors() -> Iterator[tuple[Reading, float]]:
    """Yield the counter of each processor package in joules, and where it wraps around."""
    for folder in sorted(POWERCAP.glob("intel-rapl:*")):
        try:
            # parts of a package are counted in it already, and it in that of the whole platform
            if not (folder / "name").read_text().startswith("package"):
                continue
            wraps_at = int((folder / "max_energy_range_uj").read_text()) / 1e6
            (folder / "energy_uj").read_text()
        except (OSError, ValueError):
            continue

        def read(path: Path = folder / "energy_uj") -> float:
            return int(path.read_text()) / 1e6

        yield read, wraps_at


def gpus() -> Iterator[tuple[Reading, float]]:
    """Yield the counter of each NVIDIA GPU in joules; it does not wrap around (0)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (
        Exception
    ):  # no library, no driver, no GPU, or one that does not count: each has an error of its own
        return
    for handle in handles:

        def read(handle: object = handle) -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        yield read, 0.0
