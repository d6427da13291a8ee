"""What the detector learns from: which anchor answers for which face, and the loss of its answers."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from negfacediff_core.faces.detect import anchor_centres
from negfacediff_core.faces.detector_network import ANCHORS, STRIDES

LEVELS = len(STRIDES)


class Anchors(NamedTuple):
    """All anchors of the three maps, in the order of the outputs."""

    centres: Tensor  # (A, 2) pixels
    strides: Tensor  # (A,) pixels
    sizes: Tensor  # (A,) pixels: the face size that an anchor is for


class Assignment(NamedTuple):
    """For each anchor of each frame: is it to find a face, which one, and does its score count at all."""

    positive: Tensor  # (N, A) bool
    face: Tensor  # (N, A) int64, index of the face; meaningful where positive
    counts: Tensor  # (N, A) bool


def make_anchors(size: int) -> Anchors:
    """Lay out the anchors of a `size` x `size` frame: two a position, for faces of 3 and 4.2 strides.

    So the three maps share faces from about 20 to 160 pixels among them in half-octave steps.
    """
    centres = [anchor_centres((size, size), stride, ANCHORS) for stride in STRIDES]
    strides = np.concatenate(
        [np.full(len(level), stride) for level, stride in zip(centres, STRIDES, strict=True)]
    )
    sizes = strides * np.tile([3.0, 3.0 * 2**0.5], len(strides) // ANCHORS)
    fields = (np.concatenate(centres), strides, sizes)
    return Anchors(*(torch.from_numpy(field.astype(np.float32)) for field in fields))


def assign(boxes: Tensor, present: Tensor, anchors: Anchors) -> Assignment:
    """Assign faces to anchors of about their size (half an octave) near their centre (a quarter of the size).

    `boxes` `(N, F, 4)`, `present` `(N, F)`. A face that no anchor fits gets the nearest. Anchors that fit a
    face half as well are left out of the score loss: neither answer would be wrong.
    """
    middles = (boxes[..., :2] + boxes[..., 2:]) / 2
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1).prod(-1).sqrt()
    known = size.clamp(anchors.sizes.min(), anchors.sizes.max())
    octaves = (known[..., None] / anchors.sizes).log2().abs()  # (N, F, A)
    away = (anchors.centres - middles[:, :, None]).abs().amax(-1) / size[..., None]
    misfit = (octaves / 0.5 + away / 0.25).masked_fill(~present[..., None], torch.inf)

    fits = (octaves <= 0.5) & (away <= 0.25) & present[..., None]
    nearest = functional.one_hot(misfit.argmin(-1), misfit.shape[-1]).bool() & present[..., None]
    fits |= nearest
    near = (octaves <= 1) & (away <= 0.4) & present[..., None]
    positive = fits.any(1)
    face = misfit.masked_fill(~fits, torch.inf).argmin(1)
    return Assignment(positive, face, positive | ~near.any(1))


def detection_loss(
    outputs: list[Tensor], boxes: Tensor, landmarks: Tensor, present: Tensor, anchors: Anchors
) -> dict[str, Tensor]:
    """Losses of the nine maps against `(N, F, 4)` boxes and `(N, F, 5, 2)` landmarks, by name.

    - score: quality focal loss (arXiv:2006.04388, eq. 1) towards the overlap of box and face, 0 elsewhere
    - box: 1 - generalised IoU (arXiv:1902.09630)
    - landmarks: smooth L1 in units of the face size

    Each is divided by the number of positive anchors; their sum is what training minimises.
    """
    scores, distances, offsets = (
        torch.cat(outputs[group * LEVELS : (group + 1) * LEVELS], 1).float() for group in range(3)
    )
    positive, face, counts = assign(boxes, present, anchors)
    image, anchor = positive.nonzero(as_tuple=True)
    target = face[image, anchor]
    total = max(len(image), 1)

    centre, stride = anchors.centres[anchor], anchors.strides[anchor, None]
    found = distances[image, anchor] * stride
    found = torch.cat([centre - found[:, :2], centre + found[:, 2:]], 1)
    truth = boxes[image, target]
    overlap, generalised = box_overlap(found, truth)

    quality = torch.zeros_like(scores[..., 0])
    quality[image, anchor] = overlap.detach().clamp(0, 1)
    likelihood = scores[..., 0].clamp(1e-6, 1 - 1e-6)
    focal = (quality - likelihood).square() * functional.binary_cross_entropy(
        likelihood, quality, reduction="none"
    )

    points = centre[:, None] + (offsets[image, anchor] * stride).unflatten(1, (5, 2))
    size = (truth[:, 2:] - truth[:, :2]).prod(1).sqrt()[:, None, None]
    error = (points - landmarks[image, target]) / size
    smooth = functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.01, reduction="sum") / 10
    return {
        "score": (focal * counts).sum() / total,
        "box": 2 * (1 - generalised).sum() / total,
        "landmarks": 10 * smooth / total,
    }


def box_overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and generalised IoU, of two `(M, 4)` sets of boxes taken pair by pair."""
    shared = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(
        0
    )
    hull = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (first, second)]
    union = areas[0] + areas[1] - shared.prod(1)
    enclosing = hull.prod(1).clamp(min=1e-6)
    overlap = shared.prod(1) / union.clamp(min=1e-6)
    return overlap, overlap - (enclosing - union) / enclosing
