"""Batches of crops, decoded and varied by threads ahead of whoever takes them, in a fixed order.

What a batch holds is a function of (seed, epoch, its images) alone: threads change when it is made, never
what it is. Threads suffice, since Pillow's decoders and torch's operations let other threads run.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negfacediff_core.recognition.datasets import TrainingSet
from negfacediff_core.recognition.randaugment import Plan, Variation, apply_variation, plan_variation
from negfacediff_core.recognition.seeds import generator_of

# Batches that are made beyond one a thread.
_AHEAD = 2


class Batch(NamedTuple):
    """Images of the set by number `(N,)`, their crops `(N, 3, 112, 112)` uint8 and labels `(N,)`."""

    images: Tensor
    crops: Tensor
    labels: Tensor


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return which images `(batches, size)` an epoch's batches hold: a permutation, cut to whole batches.

    A set that is smaller than a batch is one batch.
    """
    size = min(batch_size, count)
    order = torch.randperm(count, generator=generator_of(seed, "order", epoch)).numpy()
    return order[: count // size * size].reshape(-1, size)


class Loader:
    """Makes batches with `threads` threads; `waited` are the seconds that whoever takes them waited for them.

    With `device` cpu, threads vary the crops as well. Otherwise threads decide how, and the device does it in
    the order of its other work; `waited` has the time to tell it.
    """

    def __init__(
        self, training: TrainingSet, variation: Variation, threads: int, device: torch.device
    ) -> None:
        self.training, self.variation, self.device = training, variation, device
        self.threads, self.waited = threads, 0.0

    def batches(self, epoch: int, parts: Sequence[NDArray[np.int64]]) -> Iterator[Batch]:
        """Yield a batch on the device for each of the `parts`, the images `(N,)` that it holds, in order."""
        waiting: deque[Future[tuple[Batch, Plan]]] = deque()
        before = torch.get_num_threads()
        # each of them with one thread: for operations of theirs the network keeps the cores
        with ThreadPoolExecutor(self.threads, "loader", torch.set_num_threads, (1,)) as pool:
            try:
                for part in parts:
                    waiting.append(pool.submit(self._make, epoch, part))
                    if len(waiting) >= self.threads + _AHEAD:
                        yield self._take(waiting.popleft())
                while waiting:
                    yield self._take(waiting.popleft())
            finally:
                for future in waiting:
                    future.cancel()
                # what a thread sets for itself would hold for threads that others start later
                torch.set_num_threads(before)

    def _take(self, future: Future[tuple[Batch, Plan]]) -> Batch:
        begun = time.perf_counter()
        batch, plan = future.result()
        if self.device.type != "cpu":
            batch = Batch(*(part.to(self.device, non_blocking=True) for part in batch))
            batch = batch._replace(crops=apply_variation(batch.crops, plan.to(self.device), self.variation))
        self.waited += time.perf_counter() - begun
        return batch

    def _make(self, epoch: int, part: NDArray[np.int64]) -> tuple[Batch, Plan]:
        images = torch.from_numpy(part)
        crops = torch.from_numpy(self.training.read(part)).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(self.training.labels[part])
        plan = plan_variation(images, epoch, self.variation)
        if self.device.type == "cpu":
            return Batch(images, apply_variation(crops, plan, self.variation), labels), plan
        return Batch(*(tensor.pin_memory() for tensor in (images, crops, labels))), plan.pinned()
