"""Triangles to pixels: vertex normals and a z-buffer, for the camera and for the shadow of the key light.

Coordinates everywhere in this package: x towards the left of the subject (the right of the image), y forward
out of the face, z up, in centimetres, the origin midway between the eyes.
"""

import math

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.renders.asset import HAIR, SPECTACLES
from negfacediff_core.renders.linear import rotate
from negfacediff_core.renders.texture import compiled

#: Half the side of the square that the shadow map covers, in centimetres around the origin.
SHADOW_EXTENT = 16.0
SHADOW_SIZE = 96
#: Depths in a shadow map are shifted by this so that all of them are positive (0 means nothing was hit).
SHADOW_OFFSET = 100.0


@compiled
def vertex_normals(
    vertices: NDArray[np.floating], triangles: NDArray[np.int32], normals: NDArray[np.floating]
) -> None:
    """Write the area-weighted unit normal of each vertex into `normals` `(V, 3)`."""
    normals[:] = 0.0
    for i in range(triangles.shape[0]):
        a, b, c = triangles[i, 0], triangles[i, 1], triangles[i, 2]
        ux, uy, uz = (
            vertices[b, 0] - vertices[a, 0],
            vertices[b, 1] - vertices[a, 1],
            vertices[b, 2] - vertices[a, 2],
        )
        vx, vy, vz = (
            vertices[c, 0] - vertices[a, 0],
            vertices[c, 1] - vertices[a, 1],
            vertices[c, 2] - vertices[a, 2],
        )
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for k in (a, b, c):
            normals[k, 0] += nx
            normals[k, 1] += ny
            normals[k, 2] += nz
    for i in range(normals.shape[0]):
        length = math.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + 1e-12
        normals[i, 0] /= length
        normals[i, 1] /= length
        normals[i, 2] /= length


@compiled
def rasterise(
    points: NDArray[np.floating],
    triangles: NDArray[np.int32],
    part: NDArray[np.int32],
    skip: NDArray[np.bool_],
    cover: NDArray[np.floating],
    nearness: NDArray[np.floating],
    winner: NDArray[np.int32],
    weights: NDArray[np.floating],
) -> None:
    """Find the nearest triangle of every pixel.

    `points` is `(V, 3)`: pixel x, pixel y, and a nearness that is linear in screen space and grows towards
    the viewer (1 / depth for a camera, depth along the light for a shadow map). `skip[p]` leaves part `p`
    out. A hair triangle covers a pixel only where the interpolated `cover` `(V,)` is positive, which gives
    hair a smooth cut edge. Hair and glasses are seen from both sides; other parts only from outside
    (clockwise on the screen, whose pixel y points down).

    Fills `nearness` `(H, W)` (0: nothing), `winner` `(H, W)` (-1: nothing) and `weights` `(H, W, 2)`: the
    first two barycentric weights, perspective-correct when the nearness is 1 / depth.
    """
    height, width = nearness.shape
    nearness[:] = 0.0
    winner[:] = -1
    for i in range(triangles.shape[0]):
        kind = part[i]
        if skip[kind]:
            continue
        a, b, c = triangles[i, 0], triangles[i, 1], triangles[i, 2]
        x0, y0 = points[a, 0], points[a, 1]
        x1, y1 = points[b, 0], points[b, 1]
        x2, y2 = points[c, 0], points[c, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if area == 0.0 or (area < 0.0 and kind != HAIR and kind != SPECTACLES):
            continue
        left = max(0, math.floor(min(x0, min(x1, x2)) + 0.5))
        right = min(width - 1, math.floor(max(x0, max(x1, x2)) - 0.5))
        top = max(0, math.floor(min(y0, min(y1, y2)) + 0.5))
        bottom = min(height - 1, math.floor(max(y0, max(y1, y2)) - 0.5))
        n0, n1, n2 = points[a, 2], points[b, 2], points[c, 2]
        inverse = 1.0 / area
        for y in range(top, bottom + 1):
            dy = y + 0.5 - y0
            for x in range(left, right + 1):
                dx = x + 0.5 - x0
                w1 = (dx * (y2 - y0) - (x2 - x0) * dy) * inverse
                w2 = ((x1 - x0) * dy - dx * (y1 - y0)) * inverse
                w0 = 1.0 - w1 - w2
                if w0 < 0 or w1 < 0 or w2 < 0:
                    continue
                near = w0 * n0 + w1 * n1 + w2 * n2
                if near <= nearness[y, x]:
                    continue
                if kind == HAIR and w0 * cover[a] + w1 * cover[b] + w2 * cover[c] <= 0.0:
                    continue
                nearness[y, x] = near
                winner[y, x] = i
                weights[y, x, 0] = w0 * n0 / near
                weights[y, x, 1] = w1 * n1 / near


def light_basis(direction: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rotation `(3, 3)` into the frame of a light: rows sideways, up, and towards the light."""
    forward = direction / np.linalg.norm(direction)
    up = np.array([0.0, 0.0, 1.0]) if abs(forward[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
    side = np.cross(forward, up)
    side /= np.linalg.norm(side)
    return np.stack([side, np.cross(side, forward), forward])


def shadow_points(
    vertices: NDArray[np.float32],
    basis: NDArray[np.float64],
    extent: float = SHADOW_EXTENT,
    size: int = SHADOW_SIZE,
) -> NDArray[np.float32]:
    """Project `(V, 3)` vertices orthographically along a light: `(V, 3)` of pixel x, pixel y, nearness."""
    points = rotate(vertices, basis)
    points[:, 0] = (0.5 + points[:, 0] / (2 * extent)) * size
    points[:, 1] = (0.5 - points[:, 1] / (2 * extent)) * size
    points[:, 2] += SHADOW_OFFSET
    return points
