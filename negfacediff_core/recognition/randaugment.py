"""Random variation of training crops, of a whole batch at once: mirroring, RandAugment, random erasing.

What happens to an image is a function of (seed, epoch, row of the training set) alone, on whichever device
and in whatever batch; arithmetic is that of Pillow's operations of the same names.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from negfacediff_core import noise

# Strengths of RandAugment go from 0 to this.
MOST = 30
#: Grey in the place of what is erased: zero once pixels are scaled to [-1, 1].
ERASED = 128
# Of random erasing (arXiv 1708.04896): share of the area, and the range of height over width.
_AREA, _RATIO = (0.02, 0.33), (0.3, 3.3)
# Uniform numbers an image besides those of its operations.
_FIXED = 6


# Changes images, of which it is told the numbers as well.
_OfSome = Callable[[Tensor, Tensor], Tensor]


class Variation(NamedTuple):
    """How strongly images vary; the fields are those of `RecogniserConfig`."""

    flip: float
    operations: int
    magnitude: int
    erase: float
    seed: int


def vary(crops: Tensor, rows: Tensor, epoch: int, variation: Variation) -> Tensor:
    """Vary `(N, 3, S, S)` uint8 crops, those with the numbers `rows` `(N,)` of the training set.

    Each is mirrored with probability `flip`, goes through `operations` random rows of `OPERATIONS` one after
    the other, and loses a rectangle with probability `erase`. Returns the same shape and type.
    """
    count = _FIXED + 2 * variation.operations
    draws = noise.uniform(
        variation.seed, rows.cpu(), [epoch] * len(rows), 0, (count,), "cpu", noise.AUGMENTATION
    ).to(crops.device)
    mirrored, erased, rectangles = draws[:, 0] < variation.flip, draws[:, 1] < variation.erase, draws[:, 2:6]
    batch = _Batch(crops, torch.arange(len(crops), device=crops.device))
    batch = _each(batch, mirrored.long(), (None, lambda some, which: some.flip(3)))
    for one in range(variation.operations):
        chosen, coin = draws[:, _FIXED + 2 * one], draws[:, _FIXED + 2 * one + 1]
        batch = _randaugment(batch, chosen, coin, variation.magnitude)
    batch = _each(batch, erased.long(), (None, lambda some, which: _erased(some, rectangles[which])))
    return batch.crops.index_select(0, batch.which.argsort())


class _Batch(NamedTuple):
    """Crops in some order, and `which` `(N,)` of the batch they are."""

    crops: Tensor
    which: Tensor


def _each(batch: _Batch, numbers: Tensor, operations: Sequence[_OfSome | None]) -> _Batch:
    """Put each image through the operation with its number `(N,)`, all of one number at once; None keeps it.

    An operation is told the images, and which of the batch they are. Sorted by number, the images of an
    operation are one slice: writing them back in order, one by one, would take longer than most operations.
    """
    own = numbers[batch.which]
    order = own.argsort(stable=True)
    counts = torch.bincount(own, minlength=len(operations)).tolist()
    crops, which = batch.crops.index_select(0, order), batch.which[order]
    done = [
        operate(some, rows) if operate is not None and len(rows) else some
        for operate, some, rows in zip(operations, crops.split(counts), which.split(counts), strict=True)
    ]
    return _Batch(torch.cat(done), which)


def _randaugment(batch: _Batch, chosen: Tensor, coin: Tensor, magnitude: int) -> _Batch:
    """Put each image through one operation, picked by `chosen` `(N,)` in [0, 1); `coin` is the sign's."""
    signs = torch.where(coin < 0.5, -1.0, 1.0).float()
    operations = [
        operate and (lambda some, which, operate=operate: operate(some, magnitude / MOST, signs[which]))
        for operate in OPERATIONS.values()
    ]
    return _each(batch, (chosen * len(OPERATIONS)).long(), operations)


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


def _moved(crops: Tensor, matrix: tuple[Tensor | float, ...]) -> Tensor:
    """Take each pixel (x, y) from (a x + b y + c, d x + e y + f), the nearest one; black from outside.

    Pixels are squares of side 1 from the upper left corner; the six numbers are `(N,)` or the same for all.
    """
    count, _, side, _ = crops.shape
    a, b, c, d, e, f = (
        torch.as_tensor(number, dtype=torch.float32, device=crops.device).expand(count)[:, None, None]
        for number in matrix
    )
    middle = torch.arange(side, device=crops.device) + 0.5
    x, y = middle[None, None, :], middle[None, :, None]
    # in a black frame of one pixel, onto which everything outside falls
    columns = (a * x + (b * y + c)).floor_().clamp_(-1, side)
    lines = (d * x + (e * y + f)).floor_().clamp_(-1, side)
    source = lines.add_(1).mul_(side + 2).add_(columns).add_(1).long().flatten(1)
    framed = F.pad(crops, (1, 1, 1, 1)).flatten(2)
    return framed.gather(2, source[:, None].expand(-1, 3, -1)).view_as(crops)


def _shear_x(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Push lines sideways by up to .3 of their distance from the top."""
    return _moved(crops, (1.0, 0.3 * strength * signs, 0.0, 0.0, 1.0, 0.0))


def _shear_y(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Push columns by up to .3 of their distance from the left."""
    return _moved(crops, (1.0, 0.0, 0.0, 0.3 * strength * signs, 1.0, 0.0))


def _shifted(crops: Tensor, strength: float, signs: Tensor, axis: int) -> Tensor:
    """Take each pixel from whole pixels further along an axis, up to 150/331 of the side; black outside."""
    side = crops.shape[-1]
    pixels = int(150 / 331 * side * strength)
    result = torch.zeros_like(crops)
    for image, sign in enumerate(signs.tolist()):
        start = 0 if sign > 0 else pixels
        source, target = crops[image : image + 1], result[image : image + 1]
        moved = source.narrow(axis, start + int(sign) * pixels, side - pixels)
        target.narrow(axis, start, side - pixels).copy_(moved)
    return result


def _translate_x(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    return _shifted(crops, strength, signs, 3)


def _translate_y(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    return _shifted(crops, strength, signs, 2)


def _rotate(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Turn about the centre by up to 30 degrees."""
    angle = torch.deg2rad(30 * strength * signs)
    sine, cosine, half = angle.sin(), angle.cos(), crops.shape[-1] / 2
    return _moved(
        crops,
        (cosine, sine, half * (1 - cosine - sine), -sine, cosine, half * (1 + sine - cosine)),
    )


def _blend(plain: Tensor | None, crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Go from a `plain` form of images, None for black, to them and up to nine tenths less far or beyond."""
    factor = (1 + 0.9 * strength * signs)[:, None, None, None]
    mixed = crops.float().mul_(factor)
    if plain is not None:
        mixed.add_(plain.float().mul_(1 - factor))
    return mixed.clamp_(0, 255).to(torch.uint8)


def _grey(crops: Tensor) -> Tensor:
    """Luma (ITU-R BT.601), `(N, 1, S, S)` whole numbers."""
    red, green, blue = crops.split(1, dim=1)
    luma = red.int().mul_(19595)
    return luma.add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).bitwise_right_shift_(16)


def _brightness(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    return _blend(None, crops, strength, signs)


def _colour(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    return _blend(_grey(crops), crops, strength, signs)


def _contrast(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    grey = _grey(crops)
    # in whole numbers: a mean in floating point depends on the order of its sum
    mean = (2 * grey.sum(dim=(1, 2, 3), keepdim=True) + grey[0].numel()) // (2 * grey[0].numel())
    return _blend(mean, crops, strength, signs)


def _sharpness(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Towards or away from the mean of 3x3 pixels, the middle one five times; the border stays as it is."""
    values = crops.short()
    lines = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    total = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * values[..., 1:-1, 1:-1]
    # a thirteenth, rounded: exact for every total up to 13 x 255
    values[..., 1:-1, 1:-1] = total.int().mul_(5041).add_(32768).bitwise_right_shift_(16)
    return _blend(values, crops, strength, signs)


def _posterise(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Keep the upper bits of each number, 4 of them at full strength."""
    return crops & (0xFF << round(4 * strength) & 0xFF)


def _solarise(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Invert what is as bright as a threshold, which falls to 0 at full strength."""
    return torch.where(crops >= math.ceil(255 * (1 - strength)), 255 - crops, crops)


def _autocontrast(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Stretch each channel to the whole range."""
    flat = crops.flatten(2)
    low, high = (extreme[..., None, None].float() for extreme in torch.aminmax(flat, dim=2))
    # a channel of a single value stays as it is
    scale, low = 255 / torch.where(high > low, high - low, 255), torch.where(high > low, low, 0)
    return crops.float().sub_(low).mul_(scale).clamp_(0, 255).to(torch.uint8)


def _equalise(crops: Tensor, strength: float, signs: Tensor) -> Tensor:
    """Give each channel a flat histogram."""
    channels = crops.flatten(0, 1).flatten(1)
    # every channel's levels follow the last one's, so that one count and one table do for all
    numbers = channels.int().add_(
        256 * torch.arange(len(channels), device=crops.device, dtype=torch.int32)[:, None]
    )
    histogram = torch.bincount(numbers.view(-1), minlength=256 * len(channels)).view(-1, 256)
    last = histogram.gather(1, channels.amax(dim=1, keepdim=True).long())
    step = (channels.shape[1] - last) // 255
    before = histogram.cumsum(1) - histogram
    levels = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255)
    levels = torch.where(step > 0, levels, torch.arange(256, device=crops.device)).to(torch.uint8)
    return levels.view(-1).index_select(0, numbers.view(-1)).view_as(crops)


#: RandAugment's operations (arXiv 1909.13719) of uint8 crops, a strength in [0, 1] and signs `(N,)`, of which
#: an image gets each with the same probability.
OPERATIONS: dict[str, Callable[[Tensor, float, Tensor], Tensor] | None] = {
    "identity": None,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterise": _posterise,
    "solarise": _solarise,
    "autocontrast": _autocontrast,
    "equalise": _equalise,
}
