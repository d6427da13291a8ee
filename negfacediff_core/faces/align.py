"""Five-point alignment to the ArcFace template (arXiv:1801.07698): similarity fit and exact bilinear warp."""

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.errors import NegFaceDiffError

# Image-left eye, image-right eye, nose tip, image-left and image-right mouth corner, for a 112x112 crop.
TEMPLATE_112: NDArray[np.float64] = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
# The older 96-wide template. The published aligner cut its training crops with it and its evaluation crops
# with the one above, 8 pixels apart: kept to reproduce those crops and for nothing else.
TEMPLATE_96_LEGACY: NDArray[np.float64] = TEMPLATE_112 - np.array([8.0, 0.0])


def similarity_transform(
    landmarks: NDArray[np.floating], template: NDArray[np.floating] = TEMPLATE_112
) -> NDArray[np.float64]:
    """Fit the similarity that brings `landmarks` `(..., 5, 2)` closest to `template` `(5, 2)`, pixels (x, y).

    Returns `(..., 2, 3)` float64 matrices M with template ~ M @ (x, y, 1). Least squares over rotation,
    uniform scale and shift, never a reflection (Umeyama 1991). In the plane such a map is a complex factor
    and a shift: with centred points p and targets q as complex numbers, sum(conj(p) q) / sum(|p|^2).

    Raises NegFaceDiffError where landmarks are not finite or coincide, so that no similarity is determined.
    """
    source = np.asarray(landmarks, np.float64)
    if source.shape[-2:] != template.shape:
        raise NegFaceDiffError(
            f"Landmarks have shape {source.shape}, expected (..., {template.shape[0]}, 2): "
            "five points (x, y) a face, in the order of the ArcFace template."
        )
    points = source[..., 0] + 1j * source[..., 1]
    targets = template[:, 0] + 1j * template[:, 1]
    centred = points - points.mean(-1, keepdims=True)
    spread = (np.abs(centred) ** 2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        turn = (np.conj(centred) * (targets - targets.mean())).sum(-1) / spread
    # Below a thousandth of a pixel, or at a scale of zero, the points say nothing about angle and size.
    usable = np.isfinite(points).all(-1) & (spread > 1e-6) & (np.abs(turn) > 1e-6)
    if not np.all(usable):
        bad = np.flatnonzero(~np.atleast_1d(usable))
        raise NegFaceDiffError(
            f"Landmarks of {bad.size} face(s) (first: face {bad[0]}) are not finite, or coincide, or are "
            "scattered so that no similarity transform fits them; drop these faces before aligning."
        )
    shift = targets.mean() - turn * points.mean(-1)
    rows = np.stack([turn.real, -turn.imag, shift.real, turn.imag, turn.real, shift.imag], -1)
    return rows.reshape(*rows.shape[:-1], 2, 3)


def warp_batch(
    images: NDArray[np.uint8], matrices: NDArray[np.floating], size: int = 112
) -> NDArray[np.uint8]:
    """Cut one `(size, size, 3)` crop from each image by exact bilinear interpolation.

    `images` `(N, H, W, 3)` uint8; `matrices` `(N, 2, 3)` map image pixels to crop pixels, pixel centres at
    whole numbers. What lies outside the image is black. Returns `(N, size, size, 3)` uint8, rounded to
    nearest. A crop depends on its own image and matrix alone, never on the rest of the batch.
    """
    height, width = images.shape[1:3]
    linear = np.linalg.inv(matrices[:, :, :2])
    shift = -linear @ matrices[:, :, 2:]
    # Image pixels to the coordinates of grid_sample: -1 and 1 are the outer edges of the border pixels.
    scale = np.array([[2.0 / width], [2.0 / height]])
    theta = torch.from_numpy(scale * np.concatenate([linear, shift + 0.5], -1) - [0.0, 0.0, 1.0]).float()
    steps = torch.arange(size, dtype=torch.float32)
    grid = (
        theta[:, None, None, :, 0] * steps[None, None, :, None]
        + theta[:, None, None, :, 1] * steps[None, :, None, None]
        + theta[:, None, None, :, 2]
    )
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    crops = torch.nn.functional.grid_sample(pixels, grid, "bilinear", "zeros", align_corners=False)
    return crops.round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def warp(image: NDArray[np.uint8], matrix: NDArray[np.floating], size: int = 112) -> NDArray[np.uint8]:
    """`warp_batch` of one `(H, W, 3)` image and one `(2, 3)` matrix: a `(size, size, 3)` uint8 crop."""
    return warp_batch(image[None], matrix[None], size)[0]


def align_batch(
    images: NDArray[np.uint8], landmarks: NDArray[np.floating], size: int = 112
) -> NDArray[np.uint8]:
    """Align one face an image: `(N, H, W, 3)` uint8 and `(N, 5, 2)` landmarks to `(N, size, size, 3)` uint8.

    A `size` other than 112 scales the template with it. Raises NegFaceDiffError on degenerate landmarks.
    """
    return warp_batch(images, similarity_transform(landmarks, TEMPLATE_112 * (size / 112)), size)


def align(image: NDArray[np.uint8], landmarks: NDArray[np.floating], size: int = 112) -> NDArray[np.uint8]:
    """`align_batch` of one `(H, W, 3)` image with `(5, 2)` landmarks: a `(size, size, 3)` uint8 crop."""
    return align_batch(image[None], landmarks[None], size)[0]
