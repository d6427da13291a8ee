"""RandAugment's operations on batches of uint8 crops, with the arithmetic of Pillow's operations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Changes crops `(N, 3, S, S)`, by an amount for each `(N,)`.
Operation = Callable[[Tensor, Tensor], Tensor]


def _moved(crops: Tensor, matrix: tuple[Tensor | float, ...]) -> Tensor:
    """Take each pixel (x, y) from (a x + b y + c, d x + e y + f), the nearest one; black from outside.

    Pixels are squares of side 1 from the upper left corner; the six numbers are `(N,)` float32, or the same
    for all.
    """
    count, _, side, _ = crops.shape
    a, b, c, d, e, f = (
        (torch.full((count,), number, device=crops.device) if isinstance(number, float) else number)[
            :, None, None
        ]
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


def _shear_x(crops: Tensor, amounts: Tensor) -> Tensor:
    """Push lines sideways by up to .3 of their distance from the top."""
    return _moved(crops, (1.0, (0.3 * amounts).float(), 0.0, 0.0, 1.0, 0.0))


def _shear_y(crops: Tensor, amounts: Tensor) -> Tensor:
    """Push columns by up to .3 of their distance from the left."""
    return _moved(crops, (1.0, 0.0, 0.0, (0.3 * amounts).float(), 1.0, 0.0))


def _sources(side: int, amounts: Tensor) -> Tensor:
    """Which of `side` pixels each pixel comes from, `(N, side)`, shifted by up to 150/331 of the side; `side`
    from outside.
    """
    pixels = (150 / 331 * side * amounts).long()
    sources = torch.arange(side, device=amounts.device) + pixels[:, None]
    return sources.masked_fill_((sources < 0) | (sources >= side), side)


def _translate_x(crops: Tensor, amounts: Tensor) -> Tensor:
    """Move whole columns; black from outside."""
    sources = _sources(crops.shape[3], amounts)[:, None, None, :]
    return F.pad(crops, (0, 1)).gather(3, sources.expand_as(crops))


def _translate_y(crops: Tensor, amounts: Tensor) -> Tensor:
    """Move whole lines; black from outside."""
    sources = _sources(crops.shape[2], amounts)[:, None, :, None]
    return F.pad(crops, (0, 0, 0, 1)).gather(2, sources.expand_as(crops))


def _rotate(crops: Tensor, amounts: Tensor) -> Tensor:
    """Turn about the centre by up to 30 degrees."""
    angle = torch.deg2rad((30 * amounts).float())
    sine, cosine, half = angle.sin(), angle.cos(), crops.shape[-1] / 2
    return _moved(
        crops,
        (cosine, sine, half * (1 - cosine - sine), -sine, cosine, half * (1 + sine - cosine)),
    )


def _blend(plain: Tensor | None, crops: Tensor, amounts: Tensor) -> Tensor:
    """Go from a `plain` form of images, None for black, to them and up to nine tenths less far or beyond."""
    factor = (1 + (0.9 * amounts).float())[:, None, None, None]
    mixed = crops.float().mul_(factor)
    if plain is not None:
        mixed.add_(plain.float().mul_(1 - factor))
    return mixed.clamp_(0, 255).to(torch.uint8)


def _luma(crops: Tensor) -> Tensor:
    """Luma (ITU-R BT.601), `(N, 1, S, S)` whole numbers."""
    red, green, blue = crops.split(1, dim=1)
    luma = red.int().mul_(19595)
    return luma.add_(green, alpha=38470).add_(blue, alpha=7471).add_(32768).bitwise_right_shift_(16)


def _grey(crops: Tensor, amounts: Tensor) -> Tensor:
    return _luma(crops).to(torch.uint8).expand_as(crops)


def _brightness(crops: Tensor, amounts: Tensor) -> Tensor:
    return _blend(None, crops, amounts)


def _colour(crops: Tensor, amounts: Tensor) -> Tensor:
    return _blend(_luma(crops), crops, amounts)


def _contrast(crops: Tensor, amounts: Tensor) -> Tensor:
    grey = _luma(crops)
    # in whole numbers: a mean in floating point depends on the order of its sum
    mean = (2 * grey.sum(dim=(1, 2, 3), keepdim=True) + grey[0].numel()) // (2 * grey[0].numel())
    return _blend(mean, crops, amounts)


def _sharpness(crops: Tensor, amounts: Tensor) -> Tensor:
    """Towards or away from the mean of 3x3 pixels, the middle one five times; the border stays as it is."""
    values = crops.short()
    lines = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    total = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * values[..., 1:-1, 1:-1]
    # a thirteenth, rounded: exact for every total up to 13 x 255
    values[..., 1:-1, 1:-1] = total.int().mul_(5041).add_(32768).bitwise_right_shift_(16)
    return _blend(values, crops, amounts)


def _posterise(crops: Tensor, amounts: Tensor) -> Tensor:
    """Keep the upper bits of each number, 4 of them at full strength."""
    lost = (4 * amounts.abs()).round().long()
    return crops & (255 << lost & 255).to(torch.uint8)[:, None, None, None]


def _solarise(crops: Tensor, amounts: Tensor) -> Tensor:
    """Invert what is as bright as a threshold, which falls to 0 at full strength."""
    thresholds = (255 * (1 - amounts.abs())).ceil().to(torch.uint8)[:, None, None, None]
    return torch.where(crops >= thresholds, 255 - crops, crops)


def _autocontrast(crops: Tensor, amounts: Tensor) -> Tensor:
    """Stretch each channel to the whole range."""
    flat = crops.flatten(2)
    low, high = (extreme[..., None, None].float() for extreme in torch.aminmax(flat, dim=2))
    # a channel of a single value stays as it is
    scale, low = 255 / torch.where(high > low, high - low, 255), torch.where(high > low, low, 0)
    return crops.float().sub_(low).mul_(scale).clamp_(0, 255).to(torch.uint8)


def _equalise(crops: Tensor, amounts: Tensor) -> Tensor:
    """Give each channel a flat histogram."""
    channels = crops.flatten(0, 1).flatten(1)
    # every channel's levels follow the last one's, so that one count and one table do for all
    numbers = channels.int().add_(
        256 * torch.arange(len(channels), device=crops.device, dtype=torch.int32)[:, None]
    )
    # not bincount, which makes the CPU wait for a GPU
    one = torch.ones(1, dtype=torch.int32, device=crops.device)
    histogram = one.new_zeros(256 * len(channels)).index_add_(
        0, numbers.view(-1), one.expand(numbers.numel())
    )
    histogram = histogram.view(-1, 256)
    last = histogram.gather(1, channels.amax(dim=1, keepdim=True).long())
    step = (channels.shape[1] - last) // 255
    before = histogram.cumsum(1) - histogram
    levels = ((step // 2 + before) // step.clamp(min=1)).clamp_(max=255)
    levels = torch.where(step > 0, levels, torch.arange(256, device=crops.device)).to(torch.uint8)
    return levels.view(-1).index_select(0, numbers.view(-1)).view_as(crops)


#: Operations on uint8 crops, by amounts `(N,)` float64 in [-1, 1]: strengths, and the sign where it matters.
OPERATIONS: dict[str, Operation | None] = {
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
    "grey": _grey,
}
