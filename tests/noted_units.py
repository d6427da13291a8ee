"""Builds whose processes may die: their units leave on disk what was done with them, and by which process.

The folder of notes is named by an environment variable, so that worker processes inherit it. It may hold
poison: a file `<stage>-<unit>` that says `raise` or `die`. Another variable names a folder of planned deaths.
"""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import quote

import small_stage

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import BuildError
from negfacediff_core.store import faults, records, shards

NOTES = "NEGFACEDIFF_TEST_NOTES"
PLAN = "NEGFACEDIFF_TEST_PLAN"
# What a unit of the small stage takes, so that there is time to kill it in.
SMALL_SECONDS = 0.05

# Modules are imported once, in the fork server, which has no thread that a fork could cut in two. Torch would
# import the last, for seconds, when the first network is loaded.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["noted_units", "flows.build", "hypothesis", "pytest", "torch._dynamo"])


# What a thread is at: the stage of the unit that it began last.
_doing = threading.local()


def step_of(point: str) -> str:
    """Name a point of a commit together with its stage: the files of all stages have like names."""
    stage = getattr(_doing, "stage", None)
    return f"{stage}: {point}" if stage else point


def plan_deaths(folder: Path, steps: Iterable[str]) -> Path:
    """Plan that at each of the steps, as `step_of` names them, the process that first takes it dies."""
    folder.mkdir()
    for step in steps:
        (folder / quote(step, safe="")).touch()
    return folder


def _die_as_planned(point: str) -> None:
    try:
        Path(os.environ[PLAN], quote(step_of(point), safe="")).unlink()  # nobody else dies of it
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


if PLAN in os.environ:  # a worker process of Dask, which imports this when it gets its first unit
    faults.hook = _die_as_planned


def note(mark, spec, unit):
    with Path(os.environ[NOTES], "notes.txt").open("a") as file:
        file.write(f"{mark} {spec.name} {unit.name} {os.getpid()}\n")


def notes(folder: Path, mark: str) -> list[tuple[str, str, int]]:
    """Stage, unit and process of every note of a kind, in order; a line that is being written is left out."""
    path = folder / "notes.txt"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    words = [line.split(" ") for line in lines]
    return [(stage, unit, int(pid)) for kind, stage, unit, pid in words if kind == mark]


def count(folder: Path, mark: str) -> Counter[tuple[str, str]]:
    return Counter((stage, unit) for stage, unit, _ in notes(folder, mark))


def run_small(spec, unit, execution):
    """Make a unit of the small stage."""
    _begin(spec, unit)
    time.sleep(SMALL_SECONDS)
    record = small_stage.commit(spec, unit)
    note("end", spec, unit)
    return record


def run_real(spec, unit, execution):
    """Make a unit of any stage of a real build."""
    from negfacediff_core.stages.build import run_unit  # workers that make small units need no torch

    _begin(spec, unit)
    record = run_unit(spec, unit, execution)
    note("end", spec, unit)
    return record


def _begin(spec, unit):
    _doing.stage = spec.name
    note("start", spec, unit)
    poison = Path(os.environ[NOTES], f"{spec.name}-{unit.name}")
    if poison.exists():
        if poison.read_text() == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("poisoned")


class Direct:
    """Stands for the Prefect task of a chunk: it runs at once, and in this process."""

    @staticmethod
    def submit(label, lines, attempt, crew, window=None, return_state=False):
        from tasks.chunks import drive

        future = Future()
        future.set_result(drive(lines.unquote(), attempt, crew.unquote(), window))
        return future


def build_small(store, execution: ExecutionConfig, units: int = 8):
    """Make a small stage of so many units as a build makes a stage."""
    spec = small_stage.make_spec(store, identities=4 * units, replicates=4)
    shards.prepare(spec)
    _finish([[spec]], run_small, execution)


def build_real(store, execution: ExecutionConfig, build: BuildConfig):
    """Make a real build, without Prefect."""
    from stage_builds import planned

    from flows.build import GROUPS

    specs = planned(build, store)
    _finish([[specs[stage] for stage in group] for group in GROUPS], run_real, execution)


def _finish(groups: Iterable, run_unit, execution: ExecutionConfig) -> None:
    from flows import build as flow
    from tasks import chunks
    from tasks.executors import open_pool

    flow.run_chunk, chunks.run_unit = Direct, run_unit
    with open_pool(execution) as pool:
        crew = chunks.Crew(pool, execution, lambda stage: None, lambda stage, rows: None, threading.Event())
        for specs in groups:
            flow.finish(specs, crew)


def start(make, store: Path, folder: Path, *arguments, kill_at: str | Path | None = None):
    """Start `make(store, *arguments)` in a process, the first of a group of its own.

    It kills itself at the step `kill_at`, or, where that is a file, at the first step of whose kind the file
    lists none yet. Where it is a folder of planned deaths, it and its workers die as planned.
    """
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=_live, args=(make, str(store), str(folder), arguments, kill_at))
    process.start()
    return process


def _live(make, store, folder, arguments, kill_at):
    in_file = isinstance(kill_at, Path) and kill_at.is_file()
    listed = set(kill_at.read_text().splitlines()) if in_file else set()

    def observe(point):
        step = step_of(point)
        with Path(folder, "steps.txt").open("a") as file:
            file.write(f"{step}\n")
        if in_file and (kind := kind_of(step)) and kind not in listed:
            with kill_at.open("a") as file:
                file.write(f"{kind}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if PLAN in os.environ:
            _die_as_planned(point)

    os.setsid()
    os.environ[NOTES] = folder
    if isinstance(kill_at, Path) and not in_file:
        os.environ[PLAN] = str(kill_at)
    os.fsync = lambda handle: None  # a killed process, unlike a dead machine, loses nothing written
    faults.hook = observe
    try:
        make(store, *arguments)
    except BuildError as error:
        Path(folder, "error.txt").write_text(str(error))
        os._exit(1)


def kind_of(step: str) -> str:
    """Return a step without the numbers of its unit; nothing for one that every life takes anew."""
    return "" if "runs/" in step or "writable-" in step else re.sub(r"\d+", "#", step)


def kill_group(process) -> None:
    """Kill a started process and all that it has started, and wait for its end."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, and started nothing
            process.kill()
    process.join(60)


def results(store: Path) -> dict[str, bytes]:
    """Bytes of every file that holds results: no records, which hold times, nor what killed writers leave."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
        and not {"done", "runs", "logs"} & set(path.relative_to(store).parts)
        and path.name[0] != "."
    }


def promises(specs) -> dict[tuple[str, str], tuple]:
    """What every record says of its unit but times, by stage and unit: rows, and the hash of each file."""
    return {
        (spec.name, record.unit.name): (record.rows, record.ok, record.failed, record.sha256)
        for spec in specs
        for record in records.records(spec)
    }


def stamps(specs) -> dict[str, tuple[int, int, int]]:
    """Inode, time of change and size of every file of every committed unit, its record included."""
    found = {}
    for spec in specs:
        for record in records.records(spec):
            for path in [*record.sha256, f"done/{record.unit.name}.json"]:
                state = Path(spec.directory, path).stat()
                found[f"{spec.path}/{path}"] = (state.st_ino, state.st_mtime_ns, state.st_size)
    return found
