"""From paint to light: lamps with wrapped diffuse light and gloss, an ambient sky, and one shadow map."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.renders.asset import HAIR, LEFT_EYE, RIGHT_EYE, TEETH, TONGUE
from negfacediff_core.renders.look import OPENNESS, Colour, Dressing, Look
from negfacediff_core.renders.paint import paint
from negfacediff_core.renders.raster import SHADOW_EXTENT, SHADOW_OFFSET
from negfacediff_core.renders.texture import compiled

#: Columns of the vertex attributes, after the canonical position (0 to 2) and the surface (3 to 8).
POSITION, NORMAL = 9, 12


class Light(NamedTuple):
    """Where light comes from, linear RGB; the first lamp casts shadows."""

    lamps: NDArray[np.float64]  # (L, 6) unit direction, colour
    ambient: NDArray[np.float64]  # (2, 3) colour from the sky, from the ground


class Visible(NamedTuple):
    """What each pixel sees."""

    winner: NDArray[np.int32]  # (H, W) nearest triangle, -1 for none
    weights: NDArray[np.float32]  # (H, W, 2) its first two barycentric weights


class ShadowMap(NamedTuple):
    """Nearness along the key light `(S, S)`, and the rotation `(3, 3)` into its frame."""

    nearness: NDArray[np.float32]
    basis: NDArray[np.float64]


@compiled
def _shadow(x: float, y: float, z: float, nx: float, ny: float, nz: float, shadow: ShadowMap) -> float:
    """Share of the key light that reaches a point, averaged over 3 x 3 texels."""
    m = shadow.basis
    # half a centimetre out along the normal, so that no surface shadows itself
    x, y, z = x + 0.5 * nx, y + 0.5 * ny, z + 0.5 * nz
    size = shadow.nearness.shape[0]
    column = math.floor((0.5 + (m[0, 0] * x + m[0, 1] * y + m[0, 2] * z) / (2 * SHADOW_EXTENT)) * size)
    row = math.floor((0.5 - (m[1, 0] * x + m[1, 1] * y + m[1, 2] * z) / (2 * SHADOW_EXTENT)) * size)
    near = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + SHADOW_OFFSET + 0.6
    blocked, counted = 0, 0
    for v in range(max(0, row - 1), min(size, row + 2)):
        for u in range(max(0, column - 1), min(size, column + 2)):
            counted += 1
            if shadow.nearness[v, u] > near:
                blocked += 1
    return 1.0 - 0.85 * blocked / counted if counted > 0 else 1.0


@compiled
def _gloss(
    nx: float, ny: float, nz: float, hx: float, hy: float, hz: float, gloss: float, sharpness: int
) -> float:
    """Blinn-Phong for surfaces; for hair (negative gloss) Kajiya-Kay around strands hanging down it."""
    if gloss >= 0.0:
        cosine = nx * hx + ny * hy + nz * hz
        return gloss * cosine**sharpness if cosine > 0.0 else 0.0
    tx, ty, tz = nz * nx, nz * ny, nz * nz - 1.0
    length = math.sqrt(tx * tx + ty * ty + tz * tz) + 1e-6
    along = (tx * hx + ty * hy + tz * hz) / length
    return max(0.0, 1.0 - along * along) ** 30


@compiled
def _front(cosine: float) -> float:
    """Fade the highlight in over the first degrees past the terminator."""
    return min(1.0, max(0.0, cosine + 0.1) * 4.0)


@compiled
def _lit(
    r: float,
    g: float,
    b: float,
    gloss: float,
    sharpness: int,
    openness: float,
    px: float,
    py: float,
    pz: float,
    nx: float,
    ny: float,
    nz: float,
    eye_y: float,
    reach: float,
    light: Light,
) -> Colour:
    """Return the light that leaves a point towards the camera; the share `reach` of the key light hits it."""
    vx, vy, vz = -px, eye_y - py, -pz
    distance = math.sqrt(vx * vx + vy * vy + vz * vz)
    vx, vy, vz = vx / distance, vy / distance, vz / distance
    up = 0.5 + 0.5 * nz
    ambient, lamps = light.ambient, light.lamps
    red = r * openness * (ambient[0, 0] * up + ambient[1, 0] * (1 - up))
    green = g * openness * (ambient[0, 1] * up + ambient[1, 1] * (1 - up))
    blue = b * openness * (ambient[0, 2] * up + ambient[1, 2] * (1 - up))
    hair = gloss < 0.0
    for k in range(lamps.shape[0]):
        lx, ly, lz = lamps[k, 0], lamps[k, 1], lamps[k, 2]
        cosine = nx * lx + ny * ly + nz * lz
        # light enters skin and leaves it a little further on, red furthest: the terminator is soft and warm
        red_wrap, other_wrap = max(0.0, (cosine + 0.28) / 1.28), max(0.0, (cosine + 0.14) / 1.14)
        if red_wrap == 0.0:
            continue
        seen = reach if k == 0 else 1.0
        diffuse = seen * (0.6 + 0.4 * openness)
        hx, hy, hz = lx + vx, ly + vy, lz + vz
        length = math.sqrt(hx * hx + hy * hy + hz * hz) + 1e-9
        shine = _gloss(nx, ny, nz, hx / length, hy / length, hz / length, gloss, sharpness)
        shine *= seen * _front(cosine)
        # the highlight of hair takes its colour; that of skin and eyes is white
        sr, sg, sb = (0.5 * r + 0.01, 0.5 * g + 0.01, 0.5 * b + 0.01) if hair else (1.0, 1.0, 1.0)
        red += lamps[k, 3] * (r * diffuse * red_wrap + shine * sr)
        green += lamps[k, 4] * (g * diffuse * other_wrap + shine * sg)
        blue += lamps[k, 5] * (b * diffuse * other_wrap + shine * sb)
    return red, green, blue


@compiled
def shade(
    visible: Visible,
    triangles: NDArray[np.int32],
    part: NDArray[np.int32],
    attributes: NDArray[np.floating],
    look: Look,
    dressing: Dressing,
    light: Light,
    shadow: ShadowMap,
    eye_y: float,
    picture: NDArray[np.floating],
) -> None:
    """Write linear RGB over the backdrop `picture` `(H, W, 3)` wherever a triangle is seen.

    `attributes` `(V, 15)` holds for each vertex its canonical position, its surface (see `look`), and its
    position and unit normal as posed. The camera stands at (0, eye_y, 0).
    """
    point = np.empty(attributes.shape[1])
    surface = point[3:POSITION]
    height, width = visible.winner.shape
    for row in range(height):
        for column in range(width):
            i = visible.winner[row, column]
            if i < 0:
                continue
            a, b, c = triangles[i, 0], triangles[i, 1], triangles[i, 2]
            w0, w1 = visible.weights[row, column, 0], visible.weights[row, column, 1]
            w2 = 1.0 - w0 - w1
            for k in range(point.shape[0]):
                point[k] = w0 * attributes[a, k] + w1 * attributes[b, k] + w2 * attributes[c, k]
            kind = part[i]
            red, green, blue, gloss, sharpness = paint(
                kind, point[0], point[1], point[2], surface, look, dressing
            )
            px, py, pz = point[POSITION], point[POSITION + 1], point[POSITION + 2]
            nx, ny, nz = point[NORMAL], point[NORMAL + 1], point[NORMAL + 2]
            length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
            nx, ny, nz = nx / length, ny / length, nz / length
            openness = surface[OPENNESS]
            if kind in (LEFT_EYE, RIGHT_EYE):
                openness = 0.9
            elif kind in (TEETH, TONGUE):
                openness = 0.5
            if nx * px + ny * (py - eye_y) + nz * pz > 0.0:
                # seen from behind: only hair and glasses are; the inner side of hair lies in the dark
                nx, ny, nz = -nx, -ny, -nz
                if kind == HAIR:
                    openness *= 0.35
                    red, green, blue = 0.5 * red, 0.5 * green, 0.5 * blue
            reach = _shadow(px, py, pz, nx, ny, nz, shadow)
            red, green, blue = _lit(
                red, green, blue, gloss, sharpness, openness, px, py, pz, nx, ny, nz, eye_y, reach, light
            )
            picture[row, column, 0] = red
            picture[row, column, 1] = green
            picture[row, column, 2] = blue
