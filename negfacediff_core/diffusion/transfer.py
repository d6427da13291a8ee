"""Between the host and a device, without either waiting for the other."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray, device: torch.device) -> Tensor:
    """Copy an array to a device; to a GPU from pinned memory, behind the work that is queued there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Landing:
    """A tensor on its way to the host: the copy is queued behind the work that makes it."""

    def __init__(self, tensor: Tensor):
        self._done: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> NDArray:
        """The values, once they have arrived."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy()
