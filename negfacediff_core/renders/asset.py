"""The morphable head that every identity is made of, read once from `head.npz` (see `build_asset.py`)."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import WeightsError

#: Parts of the mesh, as stored for each triangle. Glasses are added at run time.
SKIN, LEFT_EYE, RIGHT_EYE, TEETH, TONGUE, HAIR, SPECTACLES = range(7)
PARTS = 7
#: Displacements are stored as whole multiples of this many centimetres.
STEP = 0.002

ASSET_PATH = Path(__file__).with_name("head.npz")


class HeadAsset(NamedTuple):
    """A morphable head: V vertices, T triangles, K shape components, R sampled heads, C local changes.

    Lengths are centimetres; x to the subject's left, y forward, z up, the origin midway between the eyes.
    """

    canonical: NDArray[np.float32]  # (V, 3) template, on which everything is painted
    triangles: NDArray[np.int32]  # (T, 3) clockwise seen from outside (this frame is left-handed)
    part: NDArray[np.int32]  # (T,)
    mean: NDArray[np.float32]  # (V, 3) mean adult head
    components: NDArray[np.float32]  # (K, V, 3) principal components of sampled adult heads
    rows: NDArray[np.float32]  # (R, K) coefficients of the sampled heads
    phenotypes: dict[str, NDArray[np.float32]]  # name -> (R,) values in [0, 1] of the sampled heads
    changes: tuple[str, ...]  # C names such as "l-cheek-bones-incr"
    increase: NDArray[np.float32]  # (C, V, 3) displacement at +1
    decrease: NDArray[np.float32]  # (C, V, 3) displacement at -1
    actions: dict[str, NDArray[np.float32]]  # facial action -> (V, 3) displacement at 1
    lips: NDArray[np.float32]  # (V,) in [0, 1]
    ears: NDArray[np.float32]  # (V,) in [0, 1]
    lash_distance: NDArray[np.float32]  # (V,) cm to the nearest eyelash root, at most 1
    openness: NDArray[np.float32]  # (V,) ambient visibility in [0, 1]
    vertices_of: dict[int, NDArray[np.int64]]  # part -> the vertices of its triangles
    nose_tip: int
    mouth_left: int  # the subject's left
    mouth_right: int


@lru_cache(maxsize=1)
def load_asset(path: Path = ASSET_PATH) -> HeadAsset:
    """Read the head asset. Raises WeightsError when the file is missing or is not a head asset."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
        return _unpack(stored)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise WeightsError(
            f"{path} is not a readable head asset ({error}); restore it from the release or build it anew "
            "with `negfacediff pack build-asset` (needs the extra [asset])."
        ) from error


def _unpack(stored: dict[str, NDArray]) -> HeadAsset:
    canonical = stored["canonical"]
    triangles = stored["triangles"].astype(np.int32)
    part = stored["part"].astype(np.int32)
    vertices_of = {kind: np.unique(triangles[part == kind]) for kind in range(PARTS - 1)}
    skin = vertices_of[SKIN]
    lips = _fraction(stored["lips"])
    lip_vertices = skin[lips[skin] > 0.5]
    x, y, z = canonical.T
    bridge = skin[(np.abs(x[skin]) < 0.3) & (z[skin] < -2) & (z[skin] > -5)]
    scale = np.float32(STEP)
    displacements = {
        name: stored[name].astype(np.float32) * scale
        for name in ("components", "increase", "decrease", "actions")
    }
    return HeadAsset(
        canonical=canonical,
        triangles=triangles,
        part=part,
        mean=stored["mean"],
        components=displacements["components"],
        rows=stored["rows"].astype(np.float32),
        phenotypes={
            str(name): _fraction(stored["phenotypes"][:, i])
            for i, name in enumerate(stored["phenotype_names"])
        },
        changes=tuple(str(name) for name in stored["change_names"]),
        increase=displacements["increase"],
        decrease=displacements["decrease"],
        actions={str(n): d for n, d in zip(stored["action_names"], displacements["actions"], strict=True)},
        lips=lips,
        ears=_fraction(stored["ears"]),
        lash_distance=_fraction(stored["lash_distance"]),
        openness=_fraction(stored["openness"]),
        vertices_of=vertices_of,
        nose_tip=int(bridge[np.argmax(y[bridge])]),
        mouth_left=int(lip_vertices[np.argmax(x[lip_vertices])]),
        mouth_right=int(lip_vertices[np.argmin(x[lip_vertices])]),
    )


def _fraction(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    return (stored / 255).astype(np.float32)
