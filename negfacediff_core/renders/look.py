"""What a face is painted with: named tuples, so that the numba painter reads the same names as Python does.

Colours are linear RGB; lengths are centimetres on the canonical head; strengths are in [0, 1]. There are no
arrays in a `Look`: it is handed by value through the inner loops, where every array would be counted in and
out for every pixel.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = tuple[float, float, float]
Colour = Vector


def vector(values: NDArray[np.float64]) -> Vector:
    """Return three numbers as plain floats."""
    first, second, third = (float(value) for value in values)
    return first, second, third


class Skin(NamedTuple):
    """Complexion; `pattern` seeds every noise field of the face."""

    colour: Colour
    pattern: int
    gloss: float
    mottling: float
    blush: float
    eye_circles: float
    wrinkles: float
    freckles: float
    moles: tuple[Vector, Vector, Vector]  # x, z, strength


class Lips(NamedTuple):
    """Lip colour and how much of it covers the skin."""

    colour: Colour
    strength: float


class Eyes(NamedTuple):
    """Iris and pupil (radii are angles at the centre of the eyeball, in radians), lashes and eyeshadow."""

    colour: Colour
    iris: float
    pupil: float
    lash_strength: float
    lash_width: float
    shadow_colour: Colour
    shadow_strength: float


class Brows(NamedTuple):
    """Eyebrows: a thick curve from x = `inner` to `outer` at `height` plus an arch and an outward slope."""

    colour: Colour
    inner: float
    outer: float
    height: float
    arch: float
    slope: float
    peak: float  # where along the brow the arch is highest, in [0, 1]
    thickness: float
    density: float


class Beard(NamedTuple):
    """Beard colour and density; where it grows is a vertex mask."""

    colour: Colour
    density: float


class Hair(NamedTuple):
    """Scalp hair: its outline on the canonical head, and its strands."""

    colour: Colour
    coverage: float  # 0 bald, about .75 shaved, 1 hair
    hairline: float  # z of the outline above the nose
    temples: float  # how far the outline recedes at the temples
    widow_peak: float  # how far it dips in the middle
    nape: float  # z of the outline at the back
    raggedness: float
    grain: float
    strands: float  # strands a radian around the crown
    waviness: float


class Look(NamedTuple):
    """All the paint of one identity."""

    skin: Skin
    lips: Lips
    eyes: Eyes
    brows: Brows
    beard: Beard
    hair: Hair


class Dressing(NamedTuple):
    """Paint that changes from image to image: gaze, shirt, glasses; and where the eyeballs are."""

    eye_centres: tuple[Vector, Vector]  # left, right, on the canonical head
    gaze: Vector
    cloth: Colour
    neckline: float
    frame: Colour


class Glasses(NamedTuple):
    """Frames: half width and height of a lens, exponent of its outline (2 is an ellipse), rim radius."""

    colour: Colour
    width: float
    height: float
    squareness: float
    rim: float
    always: bool


class Mesh(NamedTuple):
    """A paintable head of V vertices: geometry that moves, and what stays with each vertex."""

    vertices: NDArray[np.float32]  # (V, 3) centimetres
    canonical: NDArray[np.float32]  # (V, 3) where the vertex lies on the canonical head
    triangles: NDArray[np.int32]  # (T, 3)
    part: NDArray[np.int32]  # (T,)
    surface: NDArray[np.float32]  # (V, 6): lips, ears, lash distance, openness, beard, mouth cavity
    cover: NDArray[np.float32]  # (V,) hair is drawn where this is positive
    neck: NDArray[np.float32]  # (V,) 0 on the shoulders, 1 on the head: how far it follows the head's turn


LIPS, EARS, LASH, OPENNESS, BEARD, CAVITY = range(6)
