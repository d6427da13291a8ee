"""Where hair grows: the outline of scalp hair, the volume it adds, the cut of long hair, and beard masks."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.renders.asset import HAIR, HeadAsset
from negfacediff_core.renders.look import Hair
from negfacediff_core.renders.texture import bump, compiled, noise, smoothstep

#: On the canonical head: between these y, beside the ears, the outline of the hair drops to the nape.
EAR_FRONT, EAR_BACK = -2.8, -6.8
CROWN_Y = -8.0


@compiled
def scalp_height(x: float, y: float, z: float, hair: Hair, pattern: int) -> float:
    """Return how far a canonical point lies inside the hair, in centimetres (negative: bare skin)."""
    side = abs(x)
    outline = hair.hairline - hair.widow_peak * bump(side, 1.2) + hair.temples * bump(side - 4.2, 1.6)
    front = z - outline + 1.6 * max(0.0, side - 5.6)
    behind = smoothstep(y, EAR_FRONT, EAR_BACK)
    inside = front * (1.0 - behind) + (z - hair.nape) * behind
    if abs(inside) > 3.0:
        return inside  # too far from the outline for its raggedness to matter
    return inside + hair.raggedness * noise(x * hair.grain, y * hair.grain, z * hair.grain, pattern)


@compiled
def _hair_mask(
    canonical: NDArray[np.floating],
    ears: NDArray[np.floating],
    hair: Hair,
    pattern: int,
    mask: NDArray[np.floating],
) -> None:
    for i in range(canonical.shape[0]):
        x, y, z = canonical[i, 0], canonical[i, 1], canonical[i, 2]
        if z > -9.0:
            inside = smoothstep(scalp_height(x, y, z, hair, pattern), -0.2, 2.2)
            mask[i] = inside * (1.0 - smoothstep(ears[i], 0.02, 0.3))


@compiled
def strand(x: float, y: float, z: float, hair: Hair, pattern: int) -> float:
    """Return the brightness of a strand, about [.6, 1.3]: strands run down meridians from the crown."""
    around = math.atan2(x, y - CROWN_Y) * hair.strands
    wave = hair.waviness * noise(x * 0.6, y * 0.6, z * 0.6, pattern + 23)
    return (
        0.95
        + 0.28 * noise(around + wave, z * 0.22, 0.0, pattern + 21)
        + 0.1 * noise(3.1 * around, z * 0.5, 7.0, pattern + 22)
    )


def hair_lift(
    head: HeadAsset, normals: NDArray[np.float32], hair: Hair, pattern: int, volume: float
) -> NDArray[np.float32]:
    """Return the displacement `(V, 3)` in centimetres by which hair of `volume` raises the scalp."""
    mask = np.zeros(len(head.canonical), np.float32)
    _hair_mask(head.canonical, head.ears, hair, pattern, mask)
    mask[head.vertices_of[HAIR]] = 0
    outward = head.canonical * np.array([0.9, 1, 1], np.float32) - np.array([0, -5, 1], np.float32)
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    higher = 1 + 0.5 * np.clip(head.canonical[:, 2] / 10, 0, 1)
    lift = (volume * mask * higher)[:, None] * (0.5 * normals + 0.5 * outward)
    return lift.astype(np.float32)


def long_hair_cover(head: HeadAsset, length: float, front: float) -> NDArray[np.float32]:
    """Return `(V,)`: positive where the hull of long hair is kept, z above `length`, y behind `front`."""
    _, y, z = head.canonical.T
    ragged = 0.5 * np.sin(3.0 * np.arctan2(head.canonical[:, 0], y - CROWN_Y) * 4.0)
    over_the_face = np.maximum(front - y, z - 9.5)
    return np.minimum(z - length + ragged, over_the_face).astype(np.float32)


def ramp(value: NDArray[np.float32], start: float, end: float) -> NDArray[np.float32]:
    """`smoothstep` for arrays."""
    t = np.clip((value - start) / (end - start), 0, 1)
    return t * t * (3 - 2 * t)


def _moustache(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    return ramp(np.abs(x), 3.6, 2.6) * ramp(z, -7.0, -6.2) * ramp(z, -4.6, -5.2) * ramp(y, 1, 2)


def _chin(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    return ramp(np.abs(x), 3.4, 2.4) * ramp(z, -7.2, -8.2) * ramp(y, -3, -1) * ramp(z, -14, -12.5)


def _jaw(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    cheeks = ramp(z, -5.4, -7.0) * ramp(y, -6.0, -4.5) * ramp(z, -14, -12) * ramp(np.abs(x), 1.8, 3)
    sideburns = ramp(np.abs(x), 6.2, 6.8) * ramp(y, -6.2, -5.4) * ramp(y, -3.0, -4.2) * ramp(z, 0.5, -1)
    return np.maximum(cheeks, sideburns * ramp(z, -12, -10))


def _goatee(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    return np.maximum(0.9 * _moustache(x, y, z), _chin(x, y, z))


def _full(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    return np.maximum(np.maximum(_moustache(x, y, z), _chin(x, y, z)), _jaw(x, y, z))


#: Beard style -> mask in [0, 1] of canonical coordinates.
BEARDS: dict[str, Callable[[NDArray, NDArray, NDArray], NDArray]] = {
    "full": _full,
    "goatee": _goatee,
    "moustache": _moustache,
    "chin": _chin,
}
