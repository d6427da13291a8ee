"""Processes, devices and precision of a training, by Lightning Fabric."""

import contextvars
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from negfacediff_core.errors import NegFaceDiffError, StoppedError
from negfacediff_core.recognition.training_job import TrainingJob
from negfacediff_core.stopping import ended_when, heed, unwanted

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Progress = Callable[[int, int], None]  # images seen, images to see
#: What a process does: with its Fabric, the job, and whom to tell of progress.
Work = Callable[["Fabric", TrainingJob, Progress], None]
# Seconds between two looks at whether the work is still wanted.
_WATCHED = 0.2
_PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def run_processes(work: Work, job: TrainingJob, progress: Progress) -> None:
    """Run `work` in this process, or in as many further ones as the job asks for, and wait for them.

    Raises what it raises; of several processes StoppedError, or NegFaceDiffError with what the one that
    failed said.
    """
    fabric = _fabric(job)
    if job.execution.processes == 1:
        work(fabric, job, progress)
        return
    context = multiprocessing.get_context("spawn")
    messages: Any = context.SimpleQueue()
    stop, over = context.Event(), threading.Event()
    listener = threading.Thread(target=_listen, args=(messages, progress), daemon=True)
    # as this thread is asked to end, so the processes are
    watcher = threading.Thread(target=contextvars.copy_context().run, args=(_watch, stop, over), daemon=True)
    listener.start()
    watcher.start()
    try:
        # no arguments: Fabric takes them apart, and stumbles over what is frozen
        fabric.launch(_Process(work, job, messages, stop))
        heed()
    except (
        ProcessRaisedException,
        ProcessExitedException,
    ) as error:
        last = str(error).strip().splitlines()[-1]
        raise NegFaceDiffError(
            f"A process of the training failed: {last}. The same command goes on from the last checkpoint."
        ) from error
    finally:
        over.set()
        messages.put(None)
        listener.join()
        watcher.join()


def _fabric(job: TrainingJob) -> "Fabric":
    # seconds to import, and only trainings need it
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    precision = _PRECISIONS.get(job.recipe.precision, "32-true")
    return Fabric(
        accelerator=job.device,
        devices=job.execution.processes,
        strategy="ddp_spawn" if job.execution.processes > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        # processes of this machine, whatever cluster it belongs to
        plugins=[LightningEnvironment()],
    )


class _Process:
    """The work of a process of its own, until `stop` is set; the first one tells of progress."""

    def __init__(self, work: Work, job: TrainingJob, messages: Any, stop: Any) -> None:
        self.work, self.job, self.messages, self.stop = work, job, messages, stop

    def __setstate__(self, state: dict[str, Any]) -> None:
        # in the process, and before Fabric tells the console that it begins there
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        self.__dict__.update(state)

    def __call__(self, fabric: "Fabric") -> None:
        signal.signal(signal.SIGINT, _outlive_interrupts)

        def tell(done: int, total: int) -> None:
            if fabric.global_rank == 0:
                self.messages.put((done, total))

        with ended_when(self.stop.is_set), suppress(StoppedError):
            self.work(fabric, self.job, tell)


def _outlive_interrupts(number: int, frame: FrameType | None) -> None:
    """A terminal sends Ctrl-C to all processes; who started these ends them, or is gone."""
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)


def _watch(stop: Any, over: threading.Event) -> None:
    """Set `stop` as soon as the work is unwanted, until it is `over`."""
    while not over.wait(_WATCHED):
        if unwanted():
            stop.set()
            return


def _listen(messages: Any, progress: Progress) -> None:
    while (message := messages.get()) is not None:
        progress(*message)
