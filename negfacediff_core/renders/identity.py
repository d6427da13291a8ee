"""Who is rendered: one identity's shape and paint, a pure function of (seed, identity)."""

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from negfacediff_core.renders.asset import HAIR, LEFT_EYE, RIGHT_EYE, SKIN, HeadAsset, load_asset
from negfacediff_core.renders.glasses import wear
from negfacediff_core.renders.hair import BEARDS, hair_lift, long_hair_cover, ramp
from negfacediff_core.renders.linear import weighted_sum
from negfacediff_core.renders.look import (
    Beard,
    Brows,
    Eyes,
    Glasses,
    Hair,
    Lips,
    Look,
    Mesh,
    Skin,
    vector,
)
from negfacediff_core.renders.raster import vertex_normals

#: Keeps the draws of identities apart from those of images.
IDENTITY_STREAM = 17
#: Standard deviation of a local change, whose range is [-1, 1].
CHANGE_DEVIATION = 0.34
#: Two sides of a face differ by this much.
ASYMMETRY = 0.05
#: Changes that would break the alignment or look ill at full strength: name prefix -> factor.
DAMPED = {
    "mouth-trans-out": 0.12,
    "nose-trans-out": 0.12,
    "head-trans-out": 0.12,
    "neck-trans-out": 0.05,
    "head-angle-out": 0.12,
    "head-age": 0.4,
    "neck": 0.4,
    "measure-neck": 0.4,
    "ear": 0.7,
    "eye-push": 0.7,
    "eye-height": 0.4,
    "eyebrows-angle": 0.5,
}


def from_srgb(levels: ArrayLike) -> NDArray[np.float64]:
    """Turn 8-bit display levels, `(3,)` or `(N, 3)`, into linear RGB."""
    return (np.asarray(levels) / 255.0) ** 2.2


SKIN_TONES = from_srgb(
    [
        [236, 204, 186],
        [227, 188, 164],
        [216, 172, 141],
        [199, 150, 117],
        [174, 123, 91],
        [142, 96, 67],
        [110, 73, 52],
        [84, 57, 43],
    ]
)
HAIR_COLOURS = from_srgb(
    [
        [30, 24, 20],
        [50, 34, 24],
        [80, 54, 36],
        [122, 84, 52],
        [165, 124, 76],
        [205, 170, 115],
        [126, 56, 28],
        [142, 138, 134],
        [208, 205, 198],
    ]
)
HAIR_CHANCES_FAIR = np.array([0.24, 0.23, 0.2, 0.14, 0.08, 0.05, 0.06, 0, 0])
HAIR_CHANCES_DARK = np.array([0.75, 0.2, 0.05, 0, 0, 0, 0, 0, 0])
GREY, WHITE = 7, 8
EYE_COLOURS = from_srgb(
    [
        [60, 38, 22],
        [85, 55, 30],
        [105, 95, 55],
        [75, 105, 80],
        [85, 120, 160],
        [110, 125, 135],
    ]
)
FRAME_COLOURS = from_srgb(
    [
        [20, 20, 22],
        [60, 35, 20],
        [120, 110, 100],
        [100, 20, 25],
        [30, 40, 80],
    ]
)
#: Hair cuts and their chances for men and women.
CUTS = ("bald", "shaved", "short", "full", "long")
CUT_CHANCES = {True: (0.10, 0.22, 0.38, 0.22, 0.08), False: (0.01, 0.04, 0.25, 0.2, 0.5)}
BEARD_STYLES = ("none", "moustache", "goatee", "full", "chin")
BEARD_CHANCES = (0.45, 0.1, 0.15, 0.2, 0.1)


class Person(NamedTuple):
    """The phenotype that paint depends on."""

    male: bool
    age: float  # 0 young adult .. 1 old
    african: float
    asian: float


class Identity(NamedTuple):
    """Everything that stays the same from image to image of one identity."""

    seed: int
    identity: int
    look: Look
    bare: Mesh
    spectacled: Mesh | None  # the same head with glasses on
    glasses: Glasses | None
    lift: NDArray[np.float32]  # (V, 3) displacement of the scalp by the hair, in centimetres
    long_hair: bool


def draw_identity(seed: int, identity: int) -> Identity:
    """Draw identity number `identity` of the population `seed`; both are non-negative integers.

    A head is a mix of two sampled phenotypes plus about a hundred independent local changes (nose, eyes,
    mouth, jaw ...); skin, lips, brows, eyes, hair, beard, freckles and glasses are drawn to match. The draw
    uses no other randomness, so identities can be drawn in any order and in any process.
    """
    rng = np.random.default_rng([IDENTITY_STREAM, seed, identity])
    head = load_asset()
    vertices, person = _draw_shape(rng, head)
    skin = _draw_skin(rng, person)
    hair, volume, length = _draw_hair(rng, person, skin)
    beard, beard_mask = _draw_beard(rng, person, hair, head)
    look = Look(
        skin=skin,
        lips=_draw_lips(rng, person, skin),
        eyes=_draw_eyes(rng, person, skin),
        brows=_draw_brows(rng, person, hair),
        beard=beard,
        hair=hair,
    )
    cover = np.full(len(vertices), -1, np.float32)
    if length is not None:
        cover = long_hair_cover(head, length, rng.uniform(-4.5, -2.5))
    mesh = _dress(head, vertices, beard_mask, cover)
    normals = np.empty_like(vertices)
    vertex_normals(vertices, head.triangles, normals)
    glasses = _draw_glasses(rng) if rng.random() < 0.22 else None
    return Identity(
        seed=seed,
        identity=identity,
        look=look,
        bare=mesh,
        spectacled=None if glasses is None else wear(mesh, head, glasses),
        glasses=glasses,
        lift=hair_lift(head, normals, hair, skin.pattern, volume),
        long_hair=length is not None,
    )


def _draw_shape(rng: Generator, head: HeadAsset) -> tuple[NDArray[np.float32], Person]:
    """Draw the neutral head `(V, 3)` in centimetres and the phenotype it came from."""
    gender = head.phenotypes["gender"]
    first = int(rng.integers(len(head.rows)))
    alike = np.flatnonzero((gender < 0.5) == (gender[first] < 0.5))
    second = int(rng.choice(alike))
    mix = rng.uniform(0, 0.35)

    def blend(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return (1 - mix) * values[first] + mix * values[second]

    vertices = head.mean + weighted_sum(blend(head.rows), head.components)
    changes = _draw_changes(rng, head.changes)
    vertices += weighted_sum(np.maximum(changes, 0), head.increase)
    vertices += weighted_sum(np.maximum(-changes, 0), head.decrease)
    eyes = np.concatenate([head.vertices_of[LEFT_EYE], head.vertices_of[RIGHT_EYE]])
    vertices -= vertices[eyes].mean(0)
    person = Person(
        male=bool(gender[first] < 0.5),
        age=float(np.clip((blend(head.phenotypes["age"]) - 0.8) / 0.2, 0, 1)),
        african=float(blend(head.phenotypes["african"])),
        asian=float(blend(head.phenotypes["asian"])),
    )
    return vertices.astype(np.float32), person


def _draw_changes(rng: Generator, names: tuple[str, ...]) -> NDArray[np.float32]:
    """Draw the local changes `(C,)` in [-1, 1]; left and right share one draw and differ a little."""
    shared: dict[str, float] = {}
    changes = np.zeros(len(names), np.float32)
    for i, name in enumerate(names):
        paired = name[:2] in ("l-", "r-")
        region = name[2:] if paired else name
        if region not in shared:
            shared[region] = float(np.clip(rng.normal(0, CHANGE_DEVIATION), -1, 1))
        change = shared[region] + (rng.normal(0, ASYMMETRY) if paired else 0.0)
        factor = next((f for prefix, f in DAMPED.items() if region.startswith(prefix)), 1.0)
        changes[i] = np.clip(factor * change, -1, 1)
    return changes


def _draw_skin(rng: Generator, person: Person) -> Skin:
    darkness = 5.8 * person.african + 2.0 * person.asian + 0.9 * (1 - person.african - person.asian)
    tone = float(np.clip(darkness + rng.normal(0, 0.9), 0, 6.99))
    lower, rest = int(tone), tone - int(tone)
    colour = (SKIN_TONES[lower] * (1 - rest) + SKIN_TONES[lower + 1] * rest) * np.exp(rng.normal(0, 0.05, 3))
    moles = np.stack([rng.uniform(-6, 6, 3), rng.uniform(-9, 5, 3), rng.random(3) < 0.3], axis=1)
    return Skin(
        colour=vector(colour),
        pattern=int(rng.integers(100_000)),
        gloss=float(rng.uniform(0.04, 0.13)),
        mottling=float(rng.uniform(0.05, 0.18)),
        blush=float(rng.uniform(0.1, 0.9)),
        eye_circles=float(rng.uniform(0, 0.45)),
        wrinkles=float(person.age * rng.uniform(0.4, 1.0)),
        freckles=float(rng.choice([0, 0, 0, 0.6, 1.0])) if tone < 3.5 else 0.0,
        moles=(vector(moles[0]), vector(moles[1]), vector(moles[2])),
    )


def _draw_hair(rng: Generator, person: Person, skin: Skin) -> tuple[Hair, float, float | None]:
    """Draw hair, its volume in centimetres, and the z down to which long hair hangs (None: not long)."""
    dark = person.asian >= 0.5 or _is_dark(skin)
    chances = (HAIR_CHANCES_DARK if dark else HAIR_CHANCES_FAIR) * (1 - 0.8 * person.age)
    chances[GREY] += 0.5 * person.age
    chances[WHITE] += 0.3 * person.age
    colour = HAIR_COLOURS[rng.choice(len(chances), p=chances / chances.sum())] * np.exp(rng.normal(0, 0.15))
    cut = CUTS[rng.choice(len(CUTS), p=CUT_CHANCES[person.male])]
    hairline = rng.uniform(5.2, 7.4) if person.male else rng.uniform(5.0, 6.6)
    fringe = rng.random() < 0.25 and cut in ("short", "full", "long")
    hair = Hair(
        colour=vector(colour),
        coverage=float({"bald": rng.choice([0.0, 0.15]), "shaved": 0.75}.get(cut, 1.0)),
        hairline=float(hairline - (rng.uniform(1.2, 2.6) if fringe else 0.0)),
        temples=float(rng.uniform(0, 1.6) if person.male else rng.uniform(-0.3, 0.6)),
        widow_peak=float(rng.choice([0.0, 0.0, rng.uniform(0, 0.8)])),
        nape=float(rng.uniform(-7, -4)) if cut != "long" else -10.0,
        raggedness=float(rng.uniform(0.1, 0.4)),
        grain=float(rng.uniform(0.6, 1.2)),
        strands=float(rng.uniform(9, 22)),
        waviness=float(rng.choice([0.2, 0.5, rng.uniform(0.5, 2.5)])),
    )
    volume = {
        "shaved": 0.15,
        "short": rng.uniform(0.7, 1.5),
        "full": rng.uniform(1.5, 2.8),
        "long": rng.uniform(0.8, 1.6),
    }
    length = float(rng.uniform(-16, -4)) if cut == "long" else None
    return hair, float(volume.get(cut, 0.0)), length


def _draw_beard(
    rng: Generator, person: Person, hair: Hair, head: HeadAsset
) -> tuple[Beard, NDArray[np.float32]]:
    """Draw a beard and its mask `(V,)`; a man without one has faint stubble, a woman nothing."""
    style = BEARD_STYLES[rng.choice(len(BEARD_STYLES), p=BEARD_CHANCES)]
    density = rng.uniform(0.35, 0.95)
    if style == "none":
        style, density = "full", rng.uniform(0, 0.15)
    if not person.male:
        density = 0.0
    mask = BEARDS[style](*head.canonical.T).astype(np.float32)
    return Beard(colour=vector(0.7 * np.array(hair.colour)), density=float(density)), mask


def _draw_lips(rng: Generator, person: Person, skin: Skin) -> Lips:
    if not person.male and rng.random() < 0.5:
        lipstick = np.array([0.45, 0.06, 0.08]) * np.exp(rng.normal(0, 0.35, 3))
        return Lips(colour=vector(np.clip(lipstick, 0, 0.8)), strength=0.85)
    natural = np.array(skin.colour) * np.array([0.85, 0.52, 0.52]) * np.exp(rng.normal(0, 0.08, 3))
    return Lips(colour=vector(np.clip(natural, 0, 1)), strength=float(rng.uniform(0.5, 0.9)))


def _draw_eyes(rng: Generator, person: Person, skin: Skin) -> Eyes:
    fair, dark = (0.3, 0.3, 0.12, 0.08, 0.15, 0.05), (0.7, 0.25, 0.05, 0, 0, 0)
    colour = EYE_COLOURS[rng.choice(len(EYE_COLOURS), p=dark if _is_dark(skin) else fair)]
    return Eyes(
        colour=vector(colour * np.exp(rng.normal(0, 0.1))),
        iris=float(rng.uniform(0.47, 0.54)),
        pupil=float(rng.uniform(0.17, 0.24)),
        lash_strength=float(rng.uniform(0.35, 0.8) + (0 if person.male else 0.15)),
        lash_width=float(rng.uniform(0.15, 0.28)),
        shadow_colour=(0.15, 0.08, 0.18),
        shadow_strength=0.0 if person.male else float(rng.choice([0, 0, 0.3, 0.5])),
    )


def _draw_brows(rng: Generator, person: Person, hair: Hair) -> Brows:
    # brows that rise outwards look angry, so the outer end is drawn level or lower, and the arch peaks near
    # the middle
    return Brows(
        colour=vector(np.minimum(0.8 * np.array(hair.colour), 0.25) * np.exp(rng.normal(0, 0.2))),
        inner=float(rng.uniform(0.8, 1.5)),
        outer=float(rng.uniform(4.4, 5.6)),
        height=float(rng.uniform(1.75, 2.4)),
        arch=float(rng.uniform(0.05, 0.45)),
        slope=float(rng.uniform(-0.45, 0.1)),
        peak=float(rng.uniform(0.38, 0.6)),
        thickness=float(rng.uniform(0.22, 0.52) if person.male else rng.uniform(0.14, 0.34)),
        density=float(rng.uniform(0.7, 1.0)),
    )


def _draw_glasses(rng: Generator) -> Glasses:
    return Glasses(
        colour=vector(FRAME_COLOURS[rng.integers(len(FRAME_COLOURS))]),
        width=float(rng.uniform(2.3, 2.8)),
        height=float(rng.uniform(1.6, 2.3)),
        squareness=float(rng.choice([2.0, 3.0, 5.0])),
        rim=float(rng.uniform(0.12, 0.28)),
        always=bool(rng.random() < 0.7),
    )


def _dress(
    head: HeadAsset, vertices: NDArray[np.float32], beard: NDArray[np.float32], cover: NDArray[np.float32]
) -> Mesh:
    """Put what the painter needs beside each vertex."""
    x, y, z = head.canonical.T
    skin = np.zeros(len(vertices), bool)
    skin[head.vertices_of[SKIN]] = True
    cavity = skin & (head.openness < 0.16) & (np.abs(x) < 4.5) & (z < -3.5) & (z > -11) & (y < 3.2)
    openness = 0.25 + 0.75 * np.clip(head.openness / 0.8, 0, 1)
    surface = [head.lips, head.ears, head.lash_distance, openness, beard, cavity]
    neck = ramp(z, -20.0, -11.0)
    # loose hair hangs from the head but rests on the shoulders
    neck[head.vertices_of[HAIR]] = ramp(z[head.vertices_of[HAIR]], -24.0, -8.0)
    return Mesh(
        vertices=vertices,
        canonical=head.canonical,
        triangles=head.triangles,
        part=head.part,
        surface=np.stack(surface, axis=1).astype(np.float32),
        cover=cover,
        neck=neck.astype(np.float32),
    )


def _is_dark(skin: Skin) -> bool:
    return bool(skin.colour[1] < from_srgb([0, 136, 0])[1])
