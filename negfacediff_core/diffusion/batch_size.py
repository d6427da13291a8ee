"""How many images a batch has: a default, the largest that a GPU holds, and batches of even size."""

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

# Images a batch on a CPU: 4 take 1.45 times as long an image, 8 1.25 times, and 128 gain 5 %.
CPU_BATCH = 32
# The largest batch that is tried on a GPU: long before it, the GPU has all that it can do at a time.
MOST = 1024
# The share of a GPU's memory that a trial may take: the rest is for graphs, contexts and fragments.
SHARE = 0.8


def even_size(count: int, most: int) -> int:
    """The smallest batch that covers `count` images in as few batches as `most` images a batch do.

    Then the last batch lacks fewer images than there are batches, and can be filled up to the same shape.
    """
    return -(-count // -(-count // most)) if count else most


def largest_batch(try_it: Callable[[int], None], device: torch.device) -> int:
    """Find the largest power of two, up to `MOST`, of images that fit into the memory of a GPU.

    `try_it(n)` does with n images what takes the most memory. Raises `torch.OutOfMemoryError` where not even
    one image fits.
    """
    allowed = SHARE * torch.cuda.get_device_properties(device).total_memory
    size = 1
    try_it(size)
    while size < MOST:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            try_it(2 * size)
        except torch.OutOfMemoryError:
            break
        if torch.cuda.max_memory_allocated(device) > allowed:
            break
        size *= 2
    torch.cuda.empty_cache()
    logger.info("the largest batch that fits %s has %d images", torch.cuda.get_device_name(device), size)
    return size
