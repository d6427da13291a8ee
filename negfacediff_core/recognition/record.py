"""What a network makes of the images that it is trained on: step by step, and of all of them in the end."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negfacediff_core.errors import StoppedError
from negfacediff_core.recognition.classifier import Outcome, Recogniser
from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.recognition.dynamics import RIGHT, UNSEEN, WRONG
from negfacediff_core.recognition.loader import Loader
from negfacediff_core.recognition.randaugment import UNVARIED
from negfacediff_core.stopping import unwanted

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Images that `look_back` takes at a time, and batches between two looks at whether it is still wanted.
_BATCH, _LOOK = 256, 20


class Record:
    """Of N images, as `write_epoch` takes them: `log_probability` and `outcome` `(N,)`, on a device."""

    def __init__(self, count: int, device: torch.device) -> None:
        # chosen so that the least, and the largest, over processes are right: one of them saw an image
        self.log_probability = torch.full((count,), torch.inf, device=device)
        self.outcome = torch.full((count,), UNSEEN, dtype=torch.uint8, device=device)

    def note(self, images: Tensor, outcome: Outcome) -> None:
        """Note what the network made of the images with these numbers `(K,)`."""
        self.log_probability[images] = outcome.log_probability
        self.outcome[images] = torch.where(outcome.right, RIGHT, WRONG).to(torch.uint8)

    def gather(self, processes: int) -> None:
        """Put together what the processes have noted."""
        if processes > 1:
            torch.distributed.all_reduce(self.log_probability, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(self.outcome, torch.distributed.ReduceOp.MAX)

    def accuracy(self) -> float:
        """Share of the images seen that no other identity was more similar to."""
        return float((self.outcome[self.outcome != UNSEEN] == RIGHT).float().mean())

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Both, for a file."""
        return self.log_probability.cpu().numpy(), self.outcome.cpu().numpy()


def look_back(fabric: "Fabric", network: Recogniser, crops: TrainingSet, threads: int) -> Record:
    """Have the network in evaluation look at all crops, unchanged; the processes share them.

    Raises StoppedError in all processes if nobody wants it any more.
    """
    network.eval()
    processes = fabric.world_size
    if processes > 1:
        for buffer in network.buffers():
            # each process has its own running statistics until the next step
            torch.distributed.broadcast(buffer, 0)
    record, images = Record(len(crops), fabric.device), np.arange(len(crops))
    parts = np.array_split(images, -(-len(images) // (_BATCH * processes)) * processes)
    loader = Loader(crops, UNVARIED, threads, fabric.device)
    with torch.inference_mode():
        for number, batch in enumerate(loader.batches(0, parts[fabric.global_rank :: processes])):
            if number % _LOOK == 0 and fabric.broadcast(unwanted()):
                raise StoppedError(
                    "The training was stopped at its last look; it has all else, to go on with."
                )
            with fabric.autocast():
                record.note(batch.images, network(batch.crops, batch.labels, torch.Generator()))
    record.gather(processes)
    return record
