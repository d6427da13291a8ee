"""Random variation of training crops, of a whole batch at once: mirroring, RandAugment, random erasing.

What happens to an image is a function of (seed, epoch, row of the training set) alone, on whichever device
and in whatever batch. It is decided on the CPU (`plan_variation`), so that nobody waits for a GPU that
carries it out (`apply_variation`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from negfacediff_core import noise
from negfacediff_core.recognition.pixel_operations import OPERATIONS, Operation

# Strengths of RandAugment go from 0 to this.
MOST = 30
#: Grey in the place of what is erased: zero once pixels are scaled to [-1, 1].
ERASED = 128
# Of random erasing (arXiv 1708.04896): share of the area, and the range of height over width.
_AREA, _RATIO = (0.02, 0.33), (0.3, 3.3)
# Uniform numbers an image besides those of its operations: whether it is mirrored, erased, and what of it.
_FIXED = 6


class Variation(NamedTuple):
    """How strongly images vary; the fields are those of `RecogniserConfig`, `policy` a row of `POLICIES`."""

    flip: float
    operations: int
    magnitude: int
    erase: float
    seed: int
    policy: str = "fixed"


#: Crops as they are.
UNVARIED = Variation(flip=0.0, operations=0, magnitude=0, erase=0.0, seed=0)


class Plan(NamedTuple):
    """What happens to the N images of a batch, step by step; a step does the same to neighbours.

    Sorted by what happens to them, the images of an operation are one slice: writing them back in order, one
    by one, would take longer than most operations. `orders` `(steps + 1, N)` says which image of the step
    before stands where, and in the end in the batch. In the order of each step are `amounts`, `(N,)` or of
    random erasing `(N, 4)`; `counts` are how many images each of its operations gets.
    """

    orders: Tensor
    amounts: list[Tensor]
    counts: list[list[int]]

    def pinned(self) -> "Plan":
        """Put it where a GPU fetches it by itself."""
        return self._replace(
            orders=self.orders.pin_memory(), amounts=[amounts.pin_memory() for amounts in self.amounts]
        )

    def to(self, device: torch.device) -> "Plan":
        """Copy it to a device; nobody waits for that if it is `pinned`."""
        return self._replace(
            orders=self.orders.to(device, non_blocking=True),
            amounts=[amounts.to(device, non_blocking=True) for amounts in self.amounts],
        )


def plan_variation(rows: Tensor, epoch: int, variation: Variation) -> Plan:
    """Decide what happens in an epoch to the images `rows` `(N,)` of the training set, on the CPU.

    Each is mirrored with probability `flip`, goes through `operations` random ones of its policy, one after
    the other, and loses a rectangle with probability `erase`.
    """
    policy, count = POLICIES[variation.policy], variation.operations
    draws = noise.uniform(
        variation.seed, rows, [epoch] * len(rows), 0, (_FIXED + 3 * count,), "cpu", noise.AUGMENTATION
    )
    chosen, coins = draws[:, _FIXED : _FIXED + 2 * count].unflatten(1, (count, 2)).unbind(2)
    strengths = _strengths(draws[:, _FIXED + 2 * count :], variation.magnitude, policy.random)
    signed = torch.where(coins < 0.5, -strengths, strengths)
    steps = [
        (draws[:, 0] < variation.flip, torch.zeros(len(rows)), 2),
        *((chosen[:, i] * len(policy.names), signed[:, i], len(policy.names)) for i in range(count)),
        (draws[:, 1] < variation.erase, draws[:, 2:_FIXED], 2),
    ]
    orders, amounts, counts = [], [], []
    which = torch.arange(len(rows))
    for numbers, all_amounts, operations in steps:
        own = numbers.long()[which]
        orders.append(own.argsort(stable=True))
        which = which[orders[-1]]
        amounts.append(all_amounts[which])
        counts.append(torch.bincount(own, minlength=operations).tolist())
    return Plan(torch.stack([*orders, which.argsort()]), amounts, counts)


def apply_variation(crops: Tensor, plan: Plan, variation: Variation) -> Tensor:
    """Do to `(N, 3, S, S)` uint8 crops what is planned; the plan is on their device.

    Returns the same shape and type.
    """
    policy = [OPERATIONS[name] for name in POLICIES[variation.policy].names]
    steps: list[list[Operation | None]]
    steps = [[None, _mirrored], *[policy] * variation.operations, [None, _erased]]
    for operations, order, amounts, counts in zip(
        steps, plan.orders[:-1], plan.amounts, plan.counts, strict=True
    ):
        crops = crops.index_select(0, order)
        groups = zip(operations, crops.split(counts), amounts.split(counts), strict=True)
        crops = torch.cat(
            [operate(some, much) if operate and len(some) else some for operate, some, much in groups]
        )
    return crops.index_select(0, plan.orders[-1])


def _strengths(draws: Tensor, magnitude: int, random: bool) -> Tensor:
    """Strengths of operations in [0, 1]: `magnitude`, or whole numbers from 1 to it, of `MOST`."""
    if not random:
        return torch.full_like(draws, magnitude / MOST)
    return ((draws * magnitude).floor() + 1).clamp(max=magnitude) / MOST


def _mirrored(crops: Tensor, amounts: Tensor) -> Tensor:
    return crops.flip(3)


def _erased(crops: Tensor, draws: Tensor) -> Tensor:
    """Paint a grey rectangle over each image, by four numbers `(N, 4)` in [0, 1)."""
    side = crops.shape[-1]
    area = side * side * (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[:, 0])
    least, most = map(math.log, _RATIO)
    ratio = (least + (most - least) * draws[:, 1]).exp()
    height = (area * ratio).sqrt().round().clamp(1, side - 1)
    width = (area / ratio).sqrt().round().clamp(1, side - 1)
    top, left = (draws[:, 2] * (side - height + 1)).floor(), (draws[:, 3] * (side - width + 1)).floor()
    place = torch.arange(side, device=crops.device)
    down = (place >= top[:, None]) & (place < (top + height)[:, None])
    across = (place >= left[:, None]) & (place < (left + width)[:, None])
    return crops.masked_fill(down[:, None, :, None] & across[:, None, None, :], ERASED)


class Policy(NamedTuple):
    """The `names` of operations, each as likely as another; `random`: at a strength drawn for each image."""

    names: tuple[str, ...]
    random: bool


#: RandAugment (arXiv 1909.13719) as libraries have it, and as code of IDiff-Face and NegFaceDiff has it.
POLICIES = {
    "fixed": Policy(tuple(name for name in OPERATIONS if name != "grey"), random=False),
    "idiff-face": Policy(
        tuple(name for name in OPERATIONS if name not in ("shear_y", "translate_y")), random=True
    ),
}
