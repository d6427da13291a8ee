"""Processes, devices and precision of a training, by Lightning Fabric."""

import contextvars
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from negfacediff_core.errors import NegFaceDiffError, StoppedError
from negfacediff_core.recognition.training_job import TrainingJob
from negfacediff_core.stopping import ended_when, unwanted

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from lightning_fabric import Fabric

Progress = Callable[[int, int], None]  # images seen, images to see
#: What a process does: with its Fabric, the job, and whom to tell of progress.
Work = Callable[["Fabric", TrainingJob, Progress], None]
# Seconds between two looks at whether the work is still wanted.
_WATCHED = 0.2
_PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def run_processes(work: Work, job: TrainingJob, progress: Progress) -> None:
    """Run `work` in this process, or in as many further ones as the job asks for, and wait for them.

    Raises what it raises; of several processes StoppedError if they were asked to end, what the first of them
    raised, or NegFaceDiffError if one died without a word.
    """
    fabric = _fabric(job)
    if job.execution.processes == 1:
        work(fabric, job, progress)
        return
    context = multiprocessing.get_context("spawn")
    # Nothing here has a lock, which a process that is killed could keep: a byte, and a pipe for each process.
    stop = context.RawValue("b", 0)
    pipes = [context.Pipe(duplex=False) for _ in range(job.execution.processes)]
    writers, over = [writer for _, writer in pipes], threading.Event()
    raised: list[NegFaceDiffError] = []
    listener = threading.Thread(
        target=_listen, args=([reader for reader, _ in pipes], progress, raised), daemon=True
    )
    # as this thread is asked to end, so the processes are
    watcher = threading.Thread(target=contextvars.copy_context().run, args=(_watch, stop, over), daemon=True)
    listener.start()
    watcher.start()
    failure: Exception | None = None
    try:
        # no arguments: Fabric takes them apart, and stumbles over what is frozen
        fabric.launch(_Process(work, job, writers, stop))
    except (ProcessRaisedException, ProcessExitedException) as error:
        failure = error
    finally:
        over.set()
        for writer in writers:
            writer.close()  # the last one is: the listener has heard all
        listener.join()
        watcher.join()
    if raised:
        raise raised[0] from failure
    # of a process that has died, torch asks the others to end
    if unwanted() or (stop.value and not failure):
        raise StoppedError(f"The training was stopped; {job.folder} has what it has saved, to go on with.")
    if failure:
        last = str(failure).strip().splitlines()[-1]
        raise NegFaceDiffError(
            f"A process of the training failed: {last}. The same command goes on from the last checkpoint."
        ) from failure


def _fabric(job: TrainingJob) -> "Fabric":
    # seconds to import, and only trainings need it
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    _quiet()
    precision = _PRECISIONS.get(job.precision, "32-true")
    return Fabric(
        accelerator=job.device,
        devices=job.execution.processes,
        strategy="ddp_spawn" if job.execution.processes > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        # processes of this machine, whatever cluster it belongs to
        plugins=[LightningEnvironment()],
    )


def _quiet() -> None:
    """What Fabric tells the console (the precision, the processes that begin) is no concern of the user's."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


class _Process:
    """The work of a process of its own, until `stop` is set; it tells of progress, and of what it raises."""

    def __init__(self, work: Work, job: TrainingJob, writers: Sequence["Connection"], stop: Any) -> None:
        self.work, self.job, self.writers, self.stop = work, job, writers, stop

    def __setstate__(self, state: dict[str, Any]) -> None:
        # in the process, before Fabric sets it up, and tells the console of it
        self.__dict__.update(state)
        _quiet()
        signal.signal(signal.SIGINT, _outlive_interrupts)
        signal.signal(signal.SIGTERM, self._ask_to_end)

    def __call__(self, fabric: "Fabric") -> None:
        writer = self.writers[fabric.global_rank]

        def tell(done: int, total: int) -> None:
            if fabric.global_rank == 0:
                writer.send((done, total))

        with ended_when(lambda: bool(self.stop.value)), suppress(StoppedError):
            try:
                self.work(fabric, self.job, tell)
            except StoppedError:
                raise
            except NegFaceDiffError as error:
                writer.send(error)
                raise

    def _ask_to_end(self, number: int, frame: FrameType | None) -> None:
        """A job is ended by SIGTERM to all of its processes: they save their work; a second one ends them."""
        self.stop.value = 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _outlive_interrupts(number: int, frame: FrameType | None) -> None:
    """A terminal sends Ctrl-C to all processes; who started these ends them, or is gone."""
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)


def _watch(stop: Any, over: threading.Event) -> None:
    """Set `stop` as soon as the work is unwanted, until it is `over`."""
    while not over.wait(_WATCHED):
        if unwanted():
            stop.value = 1
            return


def _listen(readers: list["Connection"], progress: Progress, raised: list[NegFaceDiffError]) -> None:
    """Pass on what processes tell, and keep what they raise, until no one can write any more."""
    while readers:
        ready = wait(readers)
        for reader in [one for one in readers if one in ready]:
            try:
                message = reader.recv()
            except (EOFError, OSError):  # the end of it, or of a message, of which a kill has left a part
                readers.remove(reader)
                continue
            if isinstance(message, NegFaceDiffError):
                raised.append(message)
            else:
                progress(*message)
