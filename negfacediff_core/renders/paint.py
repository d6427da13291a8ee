"""What colour a point of the head is: layers of paint in canonical coordinates, which follow every morph.

Every function takes and returns linear red, green, blue as scalars; `w` is the opacity of a layer.
"""

import math

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.renders.asset import HAIR, LEFT_EYE, RIGHT_EYE, SKIN, SPECTACLES, TEETH
from negfacediff_core.renders.hair import scalp_height, strand
from negfacediff_core.renders.look import (
    BEARD,
    CAVITY,
    EARS,
    LASH,
    LIPS,
    Brows,
    Colour,
    Dressing,
    Eyes,
    Look,
    Skin,
    Vector,
)
from negfacediff_core.renders.texture import bump, compiled, noise, smoothstep


@compiled
def _over(r: float, g: float, b: float, colour: Colour, shade: float, w: float) -> Colour:
    """Lay `colour * shade` over with opacity `w`."""
    return r + (colour[0] * shade - r) * w, g + (colour[1] * shade - g) * w, b + (colour[2] * shade - b) * w


@compiled
def _complexion(x: float, y: float, z: float, skin: Skin) -> Colour:
    side = abs(x)
    seed = skin.pattern
    blotches = 0.5 * noise(0.5 * x, 0.5 * y, 0.5 * z, seed) + 0.3 * noise(1.7 * x, 1.7 * y, 1.7 * z, seed + 7)
    shade = 1.0 + skin.mottling * blotches
    r, g, b = skin.colour[0] * shade, skin.colour[1] * shade, skin.colour[2] * shade
    if y < -4.0:
        return r, g, b
    cheeks = math.exp(-((side - 4.0) ** 2 + (z + 3.8) ** 2) / 5.0) + 0.7 * math.exp(
        -(side**2 + (z + 3.6) ** 2) / 1.5
    )
    w = skin.blush * cheeks * smoothstep(y, 1.0, 3.0)
    r, g, b = r * (1 - 0.03 * w), g * (1 - 0.25 * w), b * (1 - 0.22 * w)
    w = skin.eye_circles * math.exp(-((side - 3.0) ** 2 / 2.2 + (z + 1.5) ** 2 / 0.35))
    r, g, b = r * (1 - 0.6 * w), g * (1 - 0.7 * w), b * (1 - 0.6 * w)
    if skin.wrinkles > 0.0:
        w = skin.wrinkles * _wrinkles(x, z, seed)
        r, g, b = r * (1 - 0.28 * w), g * (1 - 0.3 * w), b * (1 - 0.3 * w)
    if skin.freckles > 0.0:
        spots = smoothstep(noise(5 * x, 5 * y, 5 * z, seed + 11), 0.45, 0.7)
        w = skin.freckles * spots * math.exp(-((z + 2.5) ** 2) / 8.0)
        r, g, b = r * (1 - 0.25 * w), g * (1 - 0.38 * w), b * (1 - 0.45 * w)
    if y > 0.0:
        for mole_x, mole_z, strength in skin.moles:
            apart = (x - mole_x) ** 2 + (z - mole_z) ** 2
            if apart < 0.5:
                w = strength * math.exp(-apart / 0.05)
                r, g, b = r * (1 - 0.6 * w), g * (1 - 0.68 * w), b * (1 - 0.7 * w)
    return r, g, b


@compiled
def _wrinkles(x: float, z: float, seed: int) -> float:
    """Furrows across the forehead and beside the mouth."""
    side = abs(x)
    furrows = smoothstep(math.sin(5.2 * z + 1.2 * noise(0.6 * x, 0.0, z, seed + 3)), 0.55, 1.0)
    forehead = furrows * smoothstep(z, 3.2, 4.0) * smoothstep(z, 7.0, 5.5) * smoothstep(side, 5.0, 3.5)
    fold = (
        bump(side - (2.2 + 0.35 * (-3.4 - z)), 0.16) * smoothstep(z, -7.0, -6.0) * smoothstep(z, -3.2, -4.0)
    )
    return forehead + 1.3 * fold


@compiled
def _eyelids(
    r: float, g: float, b: float, x: float, y: float, z: float, lash_distance: float, eyes: Eyes
) -> Colour:
    w = eyes.lash_strength * bump(lash_distance, eyes.lash_width)
    r, g, b = r * (1 - w), g * (1 - w), b * (1 - w)
    if eyes.shadow_strength > 0.0:
        lid = math.exp(-((abs(x) - 3.1) ** 2 / 3.0 + (z - 0.9) ** 2 / 0.5)) * smoothstep(y, -1.0, 0.5)
        r, g, b = _over(r, g, b, eyes.shadow_colour, 1.0, eyes.shadow_strength * lid)
    return r, g, b


@compiled
def _eyebrow(r: float, g: float, b: float, x: float, y: float, z: float, brows: Brows, seed: int) -> Colour:
    along = (abs(x) - brows.inner) / (brows.outer - brows.inner)
    if along < -0.15 or along > 1.15 or y < -1.5:
        return r, g, b
    from_peak = (along - brows.peak) / max(brows.peak, 1 - brows.peak)
    centre = brows.height + brows.arch * (1 - from_peak * from_peak) + brows.slope * along
    taper = (1 - 0.65 * along * along) * smoothstep(along, -0.12, 0.12) * smoothstep(along, 1.12, 0.8)
    across = (z - centre) / (brows.thickness * taper + 1e-4)
    hairs = 0.75 + 0.25 * noise(6 * x + 3 * z, 9 * z, 0.0, seed + 5)
    return _over(r, g, b, brows.colour, 1.0, math.exp(-(across**4)) * brows.density * hairs)


@compiled
def paint_skin(
    x: float, y: float, z: float, surface: NDArray[np.floating], look: Look, cloth: Colour, neckline: float
) -> tuple[float, float, float, float]:
    """Return r, g, b and gloss of a point of the body; `surface` `(6,)` is described in `look`."""
    seed = look.skin.pattern
    gloss = look.skin.gloss
    # shirt: opaque below the neckline, which is a round or pointed opening at the front
    w = smoothstep(z + 2.0 * neckline * max(0.0, 1 - abs(x) / 9.0), -14.5, -15.1)
    if w >= 1.0:
        weave = 1 + 0.12 * noise(0.8 * x, 0.8 * y, 0.8 * z, seed + 31)
        return cloth[0] * weave, cloth[1] * weave, cloth[2] * weave, 0.0
    r, g, b = _complexion(x, y, z, look.skin)
    lip = smoothstep(surface[LIPS], 0.35, 0.8) * look.lips.strength
    r, g, b = _over(r, g, b, look.lips.colour, 1.0, lip)
    gloss += 0.15 * lip
    inside = surface[CAVITY]
    r, g, b = r + (0.16 - r) * inside, g + (0.05 - g) * inside, b + (0.05 - b) * inside
    r, g, b = _eyelids(r, g, b, x, y, z, surface[LASH], look.eyes)
    r, g, b = _eyebrow(r, g, b, x, y, z, look.brows, seed)
    if look.beard.density > 0.0 and surface[BEARD] > 0.0:
        hairs = 0.8 + 0.35 * noise(5 * x, 5 * y, 3 * z, seed + 9)
        beard = min(1.0, max(0.0, surface[BEARD] * look.beard.density * hairs))
        beard *= 1 - smoothstep(surface[LIPS], 0.3, 0.7)
        r, g, b = _over(r, g, b, look.beard.colour, 1.0, beard)
        gloss *= 1 - beard
    if look.hair.coverage > 0.0 and z > -12.0:
        inside = smoothstep(scalp_height(x, y, z, look.hair, seed), -0.25, 0.35)
        inside *= look.hair.coverage * (1 - smoothstep(surface[EARS], 0.05, 0.4))
        if inside > 0.0:
            r, g, b = _over(r, g, b, look.hair.colour, strand(x, y, z, look.hair, seed), inside)
            # -1 tells the light that this is hair
            gloss = -1.0 if inside > 0.6 else gloss * (1 - inside)
    r, g, b = _over(r, g, b, cloth, 1.0, w)
    return r, g, b, gloss


@compiled
def paint_eye(dx: float, dy: float, dz: float, gaze: Vector, eyes: Eyes, seed: int) -> Colour:
    """Return r, g, b of a point at (dx, dy, dz) from the centre of an eyeball that looks along `gaze`."""
    radius = math.sqrt(dx * dx + dy * dy + dz * dz) + 1e-9
    angle = math.acos(min(1.0, max(-1.0, (dx * gaze[0] + dy * gaze[1] + dz * gaze[2]) / radius)))
    r, g, b = 0.84, 0.81, 0.78
    limbus = 1 - 0.5 * smoothstep(angle, eyes.iris - 0.12, eyes.iris)
    fibres = limbus * (0.8 + 0.4 * noise(12 * dx, 12 * dz, 0.0, seed + 41))
    r, g, b = _over(r, g, b, eyes.colour, fibres, smoothstep(angle, eyes.iris + 0.04, eyes.iris - 0.04))
    # the pupil, and the shadow of the upper lid
    w = 1 - 0.95 * smoothstep(angle, eyes.pupil + 0.04, eyes.pupil - 0.03)
    w *= 1 - 0.45 * smoothstep(dz, 0.25, 0.95)
    return r * w, g * w, b * w


@compiled
def paint(
    kind: int, x: float, y: float, z: float, surface: NDArray[np.floating], look: Look, dressing: Dressing
) -> tuple[float, float, float, float, int]:
    """Return r, g, b, gloss (negative: hair) and its sharpness for a canonical point of part `kind`."""
    seed = look.skin.pattern
    if kind == SKIN:
        r, g, b, gloss = paint_skin(x, y, z, surface, look, dressing.cloth, dressing.neckline)
        return r, g, b, gloss, 12
    if kind in (LEFT_EYE, RIGHT_EYE):
        centre = dressing.eye_centres[kind - LEFT_EYE]
        r, g, b = paint_eye(x - centre[0], y - centre[1], z - centre[2], dressing.gaze, look.eyes, seed)
        return r, g, b, 0.6, 40
    if kind == HAIR:
        shade = strand(x, y, z, look.hair, seed)
        colour = look.hair.colour
        return colour[0] * shade, colour[1] * shade, colour[2] * shade, -1.0, 1
    if kind == SPECTACLES:
        return dressing.frame[0], dressing.frame[1], dressing.frame[2], 0.5, 30
    if kind == TEETH:
        return 0.80, 0.74, 0.64, 0.1, 20
    return 0.45, 0.18, 0.17, 0.1, 12
