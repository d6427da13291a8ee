"""Turning the head, projecting it, and placing the face in the picture."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.renders.linear import rotate

#: Where the five landmarks lie in an aligned 112 x 112 face: image-left eye, image-right eye, nose, mouth
#: corners.
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
TEMPLATE_SIZE = 112
#: The joint that the head turns about, in centimetres.
NECK_JOINT = np.array([0.0, -7.0, -10.0], np.float32)


class Similarity(NamedTuple):
    """A rotation, scaling and shift of the picture plane as complex numbers: z -> factor * z + shift."""

    factor: complex
    shift: complex

    def apply(self, points: NDArray) -> NDArray[np.float64]:
        """Map `(N, 2)` points."""
        z = self.factor * (points[:, 0] + 1j * points[:, 1]) + self.shift
        return np.stack([z.real, z.imag], axis=1)

    def about(self, centre: complex, factor: complex, offset: complex) -> "Similarity":
        """Follow this map by a rotation and scaling about `centre` and a shift by `offset`."""
        return Similarity(factor * self.factor, factor * (self.shift - centre) + centre + offset)


def fit_similarity(source: NDArray, target: NDArray) -> Similarity:
    """Return the least-squares similarity, never a reflection, from `(N, 2)` to `(N, 2)` points."""
    s, t = source[:, 0] + 1j * source[:, 1], target[:, 0] + 1j * target[:, 1]
    centred = s - s.mean()
    factor = complex((centred.conj() * (t - t.mean())).sum() / (abs(centred) ** 2).sum())
    return Similarity(factor, complex(t.mean() - factor * s.mean()))


def rotation(yaw: float, pitch: float, roll: float) -> NDArray[np.float64]:
    """Return the `(3, 3)` rotation: roll about y, then pitch about x, then yaw about z; radians."""
    cy, sy = math.cos(yaw), math.sin(yaw)
    cp, sp = math.cos(pitch), math.sin(pitch)
    cr, sr = math.cos(roll), math.sin(roll)
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_y = np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
    return about_z @ about_x @ about_y


def turn_head(
    vertices: NDArray[np.float32], neck: NDArray[np.float32], yaw: float, pitch: float, roll: float
) -> NDArray[np.float32]:
    """Turn the head about the neck joint; the shoulders follow by a quarter of yaw, a tenth of pitch."""
    centred = vertices - NECK_JOINT
    head = rotate(centred, rotation(yaw, pitch, roll))
    shoulders = rotate(centred, rotation(0.25 * yaw, 0.1 * pitch, 0.0))
    return shoulders + neck[:, None] * (head - shoulders) + NECK_JOINT


def project(
    vertices: NDArray[np.float32], distance: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Perspective from (0, distance, 0): `(V, 2)` x right, y down in centimetres at y = 0; `(V,)` depth."""
    depth = distance - vertices[:, 1]
    return np.stack([vertices[:, 0], -vertices[:, 2]], axis=1) * (distance / depth)[:, None], depth


def aligned_placement(landmarks: NDArray, size: int, scale: float) -> Similarity:
    """Place `(5, 2)` landmarks on the ArcFace template, resized to `size` and shrunk about the centre.

    The result counts pixels from the outer corner of the first one; the template counts from its centre.
    """
    target = (((ARCFACE_TEMPLATE + 0.5) / TEMPLATE_SIZE - 0.5) * scale + 0.5) * size
    return fit_similarity(landmarks, target)
