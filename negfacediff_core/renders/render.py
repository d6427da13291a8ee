"""The renderer's public face: an identity and a replicate number in, a picture with exact landmarks out."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError
from negfacediff_core.renders.asset import (
    HAIR,
    LEFT_EYE,
    PARTS,
    RIGHT_EYE,
    SKIN,
    SPECTACLES,
    HeadAsset,
    load_asset,
)
from negfacediff_core.renders.camera import Similarity, aligned_placement, project, turn_head
from negfacediff_core.renders.identity import Identity
from negfacediff_core.renders.look import Dressing, Mesh, Vector, vector
from negfacediff_core.renders.raster import (
    SHADOW_SIZE,
    light_basis,
    rasterise,
    shadow_points,
    vertex_normals,
)
from negfacediff_core.renders.shade import ShadowMap, Visible, shade
from negfacediff_core.renders.variation import BACKDROP_CELLS, EXPRESSIONS, Variation, draw_variation

#: Keeps the draws of images apart from those of identities.
IMAGE_STREAM = 29
#: Pixels are averaged from this many samples in each direction.
SUPERSAMPLING = 2
#: Goes up whenever the same arguments give other pictures, so that an old render set is never continued with
#: new ones.
RENDERER_VERSION = 1
DEFAULT_SHIFT = 0.012


class Render(NamedTuple):
    """A picture and where the face lies in it, in pixels with (0, 0) at the centre of the first one."""

    image: NDArray[np.uint8]  # (size, size, 3) RGB
    landmarks: NDArray[np.float32]  # (5, 2) x, y in the order of the ArcFace template
    box: NDArray[np.float32]  # (4,) x0, y0, x1, y1 of the face from forehead to chin


def render(
    identity: Identity,
    replicate: int,
    size: int = 64,
    scale: float | tuple[float, float] = 0.9,
    shift: float = DEFAULT_SHIFT,
) -> Render:
    """Render image `replicate` of an identity: a pure function of (seed, identity, replicate) and the rest.

    With one `scale` the face is aligned: its landmarks are fitted to the ArcFace 112-pixel template, resized
    to `size` and shrunk about the centre by `scale`, then moved by a normal draw of standard deviation
    `shift` x `size` pixels and zoomed by about 3%. With a pair `(smallest, largest)` the face is a find for a
    detector: its scale is uniform in that range, it is tilted by about 8 degrees and lies anywhere that keeps
    its box inside up to an overhang of `shift` x `size`. Landmarks are projections of points of the head,
    hidden or not, after all of this.

    Raises ConfigError for a size below 16, or a scale that is not positive.
    """
    check_geometry(size, scale)
    rng = np.random.default_rng([IMAGE_STREAM, identity.seed, identity.identity, replicate])
    head, variation = load_asset(), draw_variation(rng)
    mesh = _worn_mesh(identity, variation)
    vertices = _pose(identity, mesh, variation, head)
    plane, depth = project(vertices, variation.distance)
    landmarks, outline = _landmarks(plane, head), plane[_face_vertices()]
    if isinstance(scale, tuple):
        place = _anywhere(landmarks, outline, variation, size, scale, shift)
    else:
        place = _aligned(landmarks, variation, size, scale, shift)
    image = _draw(identity, mesh, vertices, place.apply(plane), depth, variation, size)
    framed = place.apply(outline)
    return Render(
        image=_sense(image, variation, rng),
        landmarks=(place.apply(landmarks) - 0.5).astype(np.float32),
        box=(np.concatenate([framed.min(0), framed.max(0)]) - 0.5).astype(np.float32),
    )


def check_geometry(size: int, scale: float | tuple[float, float]) -> None:
    """Raise ConfigError for a size or scale that `render` refuses."""
    smallest, largest = scale if isinstance(scale, tuple) else (scale, scale)
    if size < 16 or not 0 < smallest <= largest:
        raise ConfigError(
            f"cannot render at size {size} and scale {scale}: the size must be at least 16 pixels and a "
            "scale positive, with a pair in ascending order."
        )


def _worn_mesh(identity: Identity, variation: Variation) -> Mesh:
    if identity.glasses is None or identity.spectacled is None:
        return identity.bare
    wearing = variation.glasses < (0.92 if identity.glasses.always else 0.35)
    return identity.spectacled if wearing else identity.bare


def _pose(identity: Identity, mesh: Mesh, variation: Variation, head: HeadAsset) -> NDArray[np.float32]:
    """Return the vertices `(V, 3)` with expression and hair, turned, the origin midway between the eyes."""
    count = len(head.canonical)
    vertices = mesh.vertices.copy()
    displacements = _expressions()
    for name, strength in variation.expression.items():
        vertices[:count] += np.float32(strength) * displacements[name]
    vertices[:count] += np.float32(variation.hair_volume) * identity.lift
    vertices = turn_head(vertices, mesh.neck, variation.yaw, variation.pitch, variation.roll)
    return vertices - vertices[_eyes()].mean(0)


@lru_cache(maxsize=1)
def _expressions() -> dict[str, NDArray[np.float32]]:
    """Expression -> displacement `(V, 3)` at strength 1."""
    actions = load_asset().actions
    table = {}
    for name, (_, weights) in EXPRESSIONS.items():
        total = np.zeros_like(load_asset().canonical)
        for action, weight in weights.items():
            sides = ("Left", "Right") if action.endswith("*") else ("",)
            for side in sides:
                total += np.float32(weight) * actions[action.removesuffix("*") + side]
        table[name] = total
    return table


@lru_cache(maxsize=1)
def _eyes() -> NDArray[np.int64]:
    head = load_asset()
    return np.concatenate([head.vertices_of[LEFT_EYE], head.vertices_of[RIGHT_EYE]])


@lru_cache(maxsize=1)
def _face_vertices() -> NDArray[np.int64]:
    """The skin that a face detector frames: forehead to chin, in front of the ears."""
    head = load_asset()
    _, y, z = head.canonical.T
    face = (z > -11.6) & (z < 6.5) & (y > -6.0) & (head.ears < 0.3)
    return np.intersect1d(head.vertices_of[SKIN], np.flatnonzero(face))


def _landmarks(plane: NDArray[np.float32], head: HeadAsset) -> NDArray[np.float32]:
    # the subject's right is on the left of the image
    right_eye, left_eye = (plane[head.vertices_of[eye]].mean(0) for eye in (RIGHT_EYE, LEFT_EYE))
    return np.stack(
        [right_eye, left_eye, plane[head.nose_tip], plane[head.mouth_right], plane[head.mouth_left]]
    )


def _aligned(landmarks: NDArray, variation: Variation, size: int, scale: float, shift: float) -> Similarity:
    place = aligned_placement(landmarks, size, scale)
    return place.about(complex(size, size) / 2, variation.zoom, complex(*variation.jitter) * shift * size)


def _anywhere(
    landmarks: NDArray,
    outline: NDArray,
    variation: Variation,
    size: int,
    scale: tuple[float, float],
    shift: float,
) -> Similarity:
    drawn = scale[0] + (scale[1] - scale[0]) * variation.scale
    tilt = complex(np.exp(1j * variation.tilt))
    place = aligned_placement(landmarks, size, drawn).about(complex(size, size) / 2, tilt, 0)
    framed = place.apply(outline)
    # corner of the box that the draw asks for: between both borders, whichever of box and picture is the
    # larger
    corner, room = framed.min(0), size - (framed.max(0) - framed.min(0))
    start = np.minimum(0, room) - shift * size
    end = np.maximum(0, room) + shift * size
    return place.about(0, 1, complex(*(start + (end - start) * variation.position - corner)))


def _draw(
    identity: Identity,
    mesh: Mesh,
    vertices: NDArray[np.float32],
    plane: NDArray[np.float64],
    depth: NDArray[np.float32],
    variation: Variation,
    size: int,
) -> NDArray[np.float64]:
    """Rasterise, shade and average the samples: `(size, size, 3)` linear RGB, not yet exposed."""
    normals = np.empty_like(vertices)
    vertex_normals(vertices, mesh.triangles, normals)
    fine = SUPERSAMPLING * size
    points = np.concatenate([SUPERSAMPLING * plane, 1 / depth[:, None]], axis=1).astype(np.float32)
    hidden = np.zeros(PARTS, np.bool_)
    hidden[HAIR] = not identity.long_hair
    _, visible = _rasterised(points, mesh, hidden, fine)
    # eyes lie in their sockets and frames are thin: neither throws a shadow worth its aliasing
    hidden[[LEFT_EYE, RIGHT_EYE, SPECTACLES]] = True
    basis = light_basis(variation.light.lamps[0, :3])
    reached, _ = _rasterised(shadow_points(vertices, basis), mesh, hidden, SHADOW_SIZE)
    look = identity.look
    skin = look.skin._replace(colour=vector(np.array(look.skin.colour) * variation.skin_brightness))
    dressing = Dressing(
        eye_centres=_eye_centres(),
        gaze=variation.gaze,
        cloth=variation.cloth,
        neckline=variation.neckline,
        frame=(0.0, 0.0, 0.0) if identity.glasses is None else identity.glasses.colour,
    )
    weights = _spline_weights(fine)
    rows = np.einsum("yi,ijc->yjc", weights, variation.backdrop)
    picture = np.ascontiguousarray(np.einsum("yjc,xj->yxc", rows, weights))
    shade(
        visible,
        mesh.triangles,
        mesh.part,
        np.concatenate([mesh.canonical, mesh.surface, vertices, normals], axis=1),
        look._replace(skin=skin),
        dressing,
        variation.light,
        ShadowMap(reached, basis),
        variation.distance,
        picture,
    )
    average = np.zeros((size, size, 3))
    for i in range(SUPERSAMPLING):
        for j in range(SUPERSAMPLING):
            average += picture[i::SUPERSAMPLING, j::SUPERSAMPLING]
    return average / SUPERSAMPLING**2


def _rasterised(
    points: NDArray[np.float32], mesh: Mesh, hidden: NDArray[np.bool_], size: int
) -> tuple[NDArray[np.float32], Visible]:
    nearness = np.empty((size, size), np.float32)
    visible = Visible(np.empty((size, size), np.int32), np.empty((size, size, 2), np.float32))
    rasterise(
        points, mesh.triangles, mesh.part, hidden, mesh.cover, nearness, visible.winner, visible.weights
    )
    return nearness, visible


@lru_cache(maxsize=1)
def _eye_centres() -> tuple[Vector, Vector]:
    head = load_asset()
    left, right = (vector(head.canonical[head.vertices_of[eye]].mean(0)) for eye in (LEFT_EYE, RIGHT_EYE))
    return left, right


@lru_cache(maxsize=4)
def _spline_weights(size: int) -> NDArray[np.float64]:
    """Cubic B-spline weights `(size, BACKDROP_CELLS)` that blow a coarse backdrop up smoothly."""
    at = (np.arange(size) + 0.5) / size * (BACKDROP_CELLS - 1)
    t = np.abs(at[:, None] - np.arange(BACKDROP_CELLS)[None])
    weights = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
    return weights / weights.sum(1, keepdims=True)


def _sense(linear: NDArray[np.float64], variation: Variation, rng: Generator) -> NDArray[np.uint8]:
    """Expose, compress highlights, gamma-encode, blur, add sensor noise and quantise."""
    size = len(linear)
    exposed = np.maximum(linear * variation.exposure, 0)
    encoded = np.clip(exposed / (1 + 0.22 * exposed), 0, 1) ** (1 / 2.2)
    if variation.blur > 0:
        encoded = _gaussian_blur(encoded, variation.blur * size / 112)
    encoded = encoded + variation.sensor_noise * rng.standard_normal(encoded.shape)
    if variation.grey:
        encoded = np.repeat(encoded.mean(2, keepdims=True), 3, axis=2)
    return (np.clip(encoded, 0, 1) * 255 + 0.5).astype(np.uint8)


def _gaussian_blur(image: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """Blur `(H, W, 3)` with edges repeated."""
    radius = max(1, int(3 * deviation))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        widths = [(0, 0)] * 3
        widths[axis] = (radius, radius)
        padded = np.pad(image, widths, mode="edge")
        count = image.shape[axis]
        shifted = (padded.take(range(i, i + count), axis) for i in range(len(kernel)))
        image = sum(
            (weight * part for weight, part in zip(kernel, shifted, strict=True)), np.zeros_like(image)
        )
    return image
