"""Processes, devices and precision of a training, by Lightning Fabric."""

import multiprocessing
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.recognition.training_job import TrainingJob

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Progress = Callable[[int, int], None]  # images seen, images to see
#: What a process does: with its Fabric, the job, and whom to tell of progress.
Work = Callable[["Fabric", TrainingJob, Progress], None]
_PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed"}


def run_processes(work: Work, job: TrainingJob, progress: Progress) -> None:
    """Run `work` in this process, or in as many further ones as the job asks for, and wait for them.

    Raises what it raises; of several processes NegFaceDiffError, with what the one that failed said.
    """
    fabric = _fabric(job)
    if job.execution.processes == 1:
        work(fabric, job, progress)
        return
    messages: Any = multiprocessing.get_context("spawn").SimpleQueue()
    listener = threading.Thread(target=_listen, args=(messages, progress), daemon=True)
    listener.start()
    try:
        # bound to the function: Fabric takes arguments apart, and stumbles over what is frozen
        fabric.launch(partial(_work_and_tell, work=work, job=job, messages=messages))
    except (
        ProcessRaisedException,
        ProcessExitedException,
    ) as error:
        last = str(error).strip().splitlines()[-1]
        raise NegFaceDiffError(
            f"A process of the training failed: {last}. The same command goes on from the last checkpoint."
        ) from error
    finally:
        messages.put(None)
        listener.join()


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


def _work_and_tell(fabric: "Fabric", work: Work, job: TrainingJob, messages: Any) -> None:
    """Work in a process of its own; the first one tells of progress."""

    def tell(done: int, total: int) -> None:
        if fabric.global_rank == 0:
            messages.put((done, total))

    work(fabric, job, tell)


def _listen(messages: Any, progress: Progress) -> None:
    while (message := messages.get()) is not None:
        progress(*message)
