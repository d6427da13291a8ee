"""Training frames for the detector: placed faces, mosaics, and frames without any face."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from negfacediff_core.faces.detect import MEAN, STD

MOSAIC_SHARE = 0.2
EMPTY_SHARE = 0.25
ZOOM = 0.15  # natural logarithm, each way, about filling the frame
TURN = 0.1  # radians, standard deviation
SHIFT = 0.06  # of the frame, each way
MIRRORED = [1, 0, 2, 4, 3]  # a mirrored left eye is a right eye


class LabelledImages(NamedTuple):
    """Images of one face each: `(N, S, S, 3)` uint8 RGB; boxes `(N, 4)`, landmarks `(N, 5, 2)` in pixels."""

    images: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]


class Frames(NamedTuple):
    """A batch for the network. Where `present` is false, box and landmarks are zero and mean nothing."""

    pixels: Tensor  # (N, 3, size, size) float32, (x - 127.5) / 128
    boxes: Tensor  # (N, F, 4) pixels
    landmarks: Tensor  # (N, F, 5, 2) pixels
    present: Tensor  # (N, F) bool


class _Faces(NamedTuple):
    """`(N, 3, size, size)` pixels in [0, 255] with `(N, F, 4)` boxes and `(N, F, 5, 2)` landmarks."""

    pixels: Tensor
    boxes: Tensor
    landmarks: Tensor


def draw_frames(
    sources: Sequence[LabelledImages], count: int, size: int, random: np.random.Generator
) -> Frames:
    """Draw `count` augmented frames of side `size`: single faces, mosaics of four faces, and empty ones.

    Everything is drawn from `random`, so that seeding by the step makes training resumable exactly.
    """
    mosaics, empties = round(count * MOSAIC_SHARE), round(count * EMPTY_SHARE)
    single = place(sources, count - mosaics - empties, size, random)
    mosaic = _mosaics(place(sources, 4 * mosaics, size // 2, random))
    empty = draw_empty(sources, empties, size, random)
    pixels = _photograph(torch.cat([single.pixels, mosaic.pixels, empty]), random)

    present = torch.zeros(count, 4, dtype=torch.bool)
    boxes, landmarks = torch.zeros(count, 4, 4), torch.zeros(count, 4, 5, 2)
    singles = len(single.pixels)
    for faces, rows in ((single, slice(singles)), (mosaic, slice(singles, singles + mosaics))):
        slots = faces.boxes.shape[1]
        present[rows, :slots] = True
        boxes[rows, :slots], landmarks[rows, :slots] = faces.boxes, faces.landmarks
    return Frames((pixels - MEAN) / STD, boxes, landmarks, present)


def place(
    sources: Sequence[LabelledImages],
    count: int,
    size: int,
    random: np.random.Generator,
) -> _Faces:
    """Draw `count` images evenly from the sources and zoom, turn, shift and mirror them into frames."""
    parts = []
    for source, share in zip(sources, np.array_split(np.arange(count), len(sources)), strict=True):
        chosen = random.integers(0, len(source.images), len(share))
        parts.append(_place(source, chosen, size, random))
    return _Faces(*(torch.cat(field) for field in zip(*parts, strict=True)))


def draw_empty(
    sources: Sequence[LabelledImages], count: int, size: int, random: np.random.Generator
) -> Tensor:
    """Draw `(count, 3, size, size)` frames in [0, 255] that hold no face: an equal share of each kind."""
    shares = np.array_split(np.arange(count), len(EMPTY_KINDS))
    return torch.cat(
        [kind(sources, len(share), size, random) for kind, share in zip(EMPTY_KINDS, shares, strict=True)]
    )


def _place(
    source: LabelledImages,
    chosen: NDArray[np.intp],
    size: int,
    random: np.random.Generator,
) -> _Faces:
    count, side = len(chosen), source.images.shape[1]
    # Resizing maps pixels by their outer corners, yet `decode` divides coordinates by the plain factor, as
    # insightface does: labels follow `decode`, so that what it returns is unbiased at the usual zoom.
    scale = size / side * np.exp(random.uniform(-ZOOM, ZOOM, count))
    angle = random.normal(0, TURN, count)
    mirror = random.random(count) < 0.5
    linear = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
    linear *= scale[:, None, None]
    linear[mirror, :, 0] *= -1
    middle = size / 2 + random.uniform(-SHIFT, SHIFT, (count, 2)) * size
    offset = middle - (linear @ np.full((2, 1), side / 2))[..., 0]

    landmarks = source.landmarks[chosen] @ linear.transpose(0, 2, 1) + offset[:, None]
    landmarks[mirror] = landmarks[mirror][:, MIRRORED]
    boxes = source.boxes[chosen].reshape(-1, 2, 2)
    centres = (linear @ boxes.mean(1)[..., None])[..., 0] + offset
    # The turn is small: the box keeps its shape and moves with its centre.
    halves = (boxes[:, 1] - boxes[:, 0]) / 2 * scale[:, None]
    corners = np.concatenate([centres - halves, centres + halves], -1)

    pixels = _sample(source.images[chosen], linear, offset, size)
    return _Faces(
        pixels, torch.from_numpy(corners)[:, None].float(), torch.from_numpy(landmarks)[:, None].float()
    )


def _sample(
    images: NDArray[np.uint8], linear: NDArray[np.float64], offset: NDArray[np.float64], size: int
) -> Tensor:
    """Sample images bilinearly where frame = linear @ image + offset, both counted from the outer corner."""
    side = images.shape[1]
    inverse = np.linalg.inv(linear) * (size / side)
    shift = (-np.linalg.inv(linear) @ offset[..., None]) * (2 / side) + inverse.sum(-1, keepdims=True) - 1
    theta = torch.from_numpy(np.concatenate([inverse, shift], -1)).float()[:, None, None]
    steps = (2 * torch.arange(size) + 1) / size - 1
    grid = theta[..., 0] * steps[:, None] + theta[..., 1] * steps[:, None, None] + theta[..., 2]
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)


def _mosaics(quarters: _Faces) -> _Faces:
    """Join every four frames into one of twice the side."""
    count, half = len(quarters.pixels) // 4, quarters.pixels.shape[-1]
    pixels = quarters.pixels.reshape(count, 2, 2, 3, half, half).permute(0, 3, 1, 4, 2, 5)
    corner = torch.tensor([[0.0, 0.0], [half, 0.0], [0.0, half], [half, half]])
    boxes = quarters.boxes.reshape(count, 4, 4) + corner.repeat(1, 2)
    landmarks = quarters.landmarks.reshape(count, 4, 5, 2) + corner[:, None]
    return _Faces(pixels.reshape(count, 3, 2 * half, 2 * half), boxes, landmarks)


def _scrambled(
    sources: Sequence[LabelledImages], count: int, size: int, random: np.random.Generator
) -> Tensor:
    """Faces cut into a grid of patches that change places: every part of a face, and no face."""
    pixels = place(sources, count, size, random).pixels
    for index in range(count):
        grid = int(random.choice([4, 8]))
        patch = size // grid
        patches = pixels[index].reshape(3, grid, patch, grid, patch).permute(1, 3, 0, 2, 4).flatten(0, 1)
        shuffled = patches[torch.from_numpy(random.permutation(grid * grid))]
        pixels[index] = shuffled.unflatten(0, (grid, grid)).permute(2, 0, 3, 1, 4).reshape(3, size, size)
    return pixels


def _effaced(sources: Sequence[LabelledImages], count: int, size: int, random: np.random.Generator) -> Tensor:
    """Heads whose eyes, nose and mouth are blurred away: hair, outline and skin alone are no face."""
    pixels, _, landmarks = place(sources, count, size, random)
    low, high = landmarks.amin((1, 2)), landmarks.amax((1, 2))
    margin = 0.4 * (high - low).amax(-1, keepdim=True)
    places = torch.arange(size)
    within = (places >= (low - margin)[..., None]) & (
        places <= (high + margin)[..., None]
    )  # (count, 2, size)
    hidden = (within[:, 0, None, :] & within[:, 1, :, None])[:, None]
    blurred = functional.interpolate(functional.adaptive_avg_pool2d(pixels, 6), size, mode="bilinear")
    return torch.where(hidden, blurred, pixels)


def _featureless(
    sources: Sequence[LabelledImages], count: int, size: int, random: np.random.Generator
) -> Tensor:
    """The colours and rough shapes of a face without features: averaged to a few pixels, then enlarged."""
    pixels = place(sources, count, size, random).pixels
    blurred = functional.adaptive_avg_pool2d(pixels, int(random.integers(3, 6)))
    return functional.interpolate(blurred, size, mode="bilinear")


def _surroundings(
    sources: Sequence[LabelledImages], count: int, size: int, random: np.random.Generator
) -> Tensor:
    """The corner farthest from the face, a third of the image wide, enlarged: background, hair, shoulders."""
    parts = []
    for source, share in zip(sources, np.array_split(np.arange(count), len(sources)), strict=True):
        chosen = random.integers(0, len(source.images), len(share))
        side = source.images.shape[1]
        low = source.boxes[chosen].reshape(-1, 2, 2).mean(1) < side / 2
        scale = 3 * size / side
        linear = np.tile(np.eye(2) * scale, (len(share), 1, 1))
        parts.append(_sample(source.images[chosen], linear, np.where(low, -2.0 * size, 0.0), size))
    return torch.cat(parts)


def _noise(sources: Sequence[LabelledImages], count: int, size: int, random: np.random.Generator) -> Tensor:
    """Random colours from a few large blots to single pixels."""
    frames = [torch.zeros(0, 3, size, size)]
    for _ in range(count):
        cells = int(2 ** random.uniform(1, np.log2(size)))
        colours = torch.from_numpy(random.uniform(0, 255, (1, 3, cells, cells)).astype(np.float32))
        frames.append(functional.interpolate(colours, size, mode="bilinear"))
    return torch.cat(frames)


EmptyKind = Callable[[Sequence[LabelledImages], int, int, np.random.Generator], Tensor]
EMPTY_KINDS: tuple[EmptyKind, ...] = (_scrambled, _effaced, _featureless, _surroundings, _noise)


def _photograph(pixels: Tensor, random: np.random.Generator) -> Tensor:
    """Vary colour, contrast, sharpness and noise of `(N, 3, size, size)` frames in [0, 255]."""
    count, size = len(pixels), pixels.shape[-1]

    def column(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).reshape(count, -1, 1, 1)

    grey = torch.from_numpy(random.random(count) < 0.1)
    pixels[grey] = pixels[grey].mean(1, keepdim=True)
    contrast = column(random.uniform(0.7, 1.3, (count, 1)) * random.uniform(0.88, 1.12, (count, 3)))
    pixels = (pixels - 127.5) * contrast + column(random.uniform(100, 155, (count, 1)))

    soft = torch.from_numpy(random.random(count) < 0.35)
    if soft.any():
        coarse = functional.interpolate(pixels[soft], round(size / random.uniform(1.5, 4)), mode="area")
        pixels[soft] = functional.interpolate(coarse, size, mode="bilinear")
    strength = random.uniform(0, 12, (count, 1)) * (random.random((count, 1)) < 0.5)
    generator = torch.Generator().manual_seed(int(random.integers(2**63)))
    noise = torch.randn(pixels.shape, generator=generator)
    return (pixels + noise * column(strength)).clamp_(0, 255)
