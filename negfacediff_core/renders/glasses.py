"""Spectacle frames as a mesh: two rims, a bridge and two temples, fitted to one head."""

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.renders.asset import LEFT_EYE, RIGHT_EYE, SKIN, SPECTACLES, HeadAsset
from negfacediff_core.renders.look import CAVITY, LASH, OPENNESS, Glasses, Mesh
from negfacediff_core.renders.raster import light_basis

RIM_POINTS, TUBE_POINTS = 28, 6
BAR_SIDES = np.array([[0, 1, 5], [0, 5, 4], [1, 2, 6], [1, 6, 5], [2, 3, 7], [2, 7, 6], [3, 0, 4], [3, 4, 7]])


def wear(mesh: Mesh, head: HeadAsset, glasses: Glasses) -> Mesh:
    """Return `mesh` with frames in front of its eyes."""
    vertices = mesh.vertices
    left, right = vertices[head.vertices_of[LEFT_EYE]], vertices[head.vertices_of[RIGHT_EYE]]
    level = (left[:, 2].mean() + right[:, 2].mean()) / 2
    front = max(left[:, 1].max(), right[:, 1].max()) + 0.9
    centres = {side: 1.06 * eye[:, 0].mean() for side, eye in ((1, left), (-1, right))}
    skin = vertices[head.vertices_of[SKIN]]
    beside_ear = skin[(np.abs(skin[:, 1] + 4) < 1) & (np.abs(skin[:, 2]) < 1.5)]
    half_head = np.abs(beside_ear[:, 0]).max() * 0.97

    pieces = [_rim(glasses, np.array([x, front, level - 0.25])) for x in centres.values()]
    inner = {side: x - side * 0.95 * glasses.width for side, x in centres.items()}
    pieces.append(
        _bar(
            [inner[-1], front + 0.15, level + 0.25], [inner[1], front + 0.15, level + 0.25], 0.8 * glasses.rim
        )
    )
    for side, x in centres.items():
        hinge = x + side * glasses.width
        ear = side * max(abs(hinge) + 0.6, half_head)
        pieces.append(_bar([hinge, front, level + 0.4], [ear, -6.0, level + 0.5], 0.7 * glasses.rim))

    offsets = np.cumsum([len(vertices)] + [len(points) for points, _ in pieces[:-1]])
    frame = np.concatenate([points for points, _ in pieces]).astype(np.float32)
    faces = np.concatenate([faces + offset for (_, faces), offset in zip(pieces, offsets, strict=True)])
    surface = np.zeros((len(frame), mesh.surface.shape[1]), np.float32)
    surface[:, LASH] = surface[:, OPENNESS] = 1
    surface[:, CAVITY] = 0
    ones = np.ones(len(frame), np.float32)
    return Mesh(
        vertices=np.concatenate([vertices, frame]),
        canonical=np.concatenate([mesh.canonical, frame]),
        triangles=np.concatenate([mesh.triangles, faces.astype(np.int32)]),
        part=np.concatenate([mesh.part, np.full(len(faces), SPECTACLES, np.int32)]),
        surface=np.concatenate([mesh.surface, surface]),
        cover=np.concatenate([mesh.cover, ones]),
        neck=np.concatenate([mesh.neck, ones]),
    )


def _rim(glasses: Glasses, centre: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A tube along the superellipse |x / width|^p + |z / height|^p = 1."""
    turn = np.linspace(0, 2 * np.pi, RIM_POINTS, endpoint=False)
    cosine, sine = np.cos(turn), np.sin(turn)
    power = 2 / glasses.squareness
    ring = np.stack(
        [
            np.sign(cosine) * np.abs(cosine) ** power * glasses.width,
            np.zeros(RIM_POINTS),
            np.sign(sine) * np.abs(sine) ** power * glasses.height,
        ],
        axis=1,
    )
    outward = ring / np.linalg.norm(ring, axis=1, keepdims=True)
    around = np.linspace(0, 2 * np.pi, TUBE_POINTS, endpoint=False)
    tube = np.cos(around)[None, :, None] * outward[:, None] + np.sin(around)[None, :, None] * np.array(
        [0, 1.0, 0]
    )
    points = (ring[:, None] + glasses.rim * tube).reshape(-1, 3) + centre
    i, j = np.meshgrid(np.arange(RIM_POINTS), np.arange(TUBE_POINTS), indexing="ij")
    next_i, next_j = (i + 1) % RIM_POINTS, (j + 1) % TUBE_POINTS
    a, b = i * TUBE_POINTS + j, next_i * TUBE_POINTS + j
    c, d = next_i * TUBE_POINTS + next_j, i * TUBE_POINTS + next_j
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    return points, faces


def _bar(
    start: list[float], end: list[float], radius: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A square bar between two points."""
    first, last = np.array(start), np.array(end)
    side, up, _ = light_basis(last - first)
    corners = [u * side + v * up for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    points = np.array([end_point + radius * corner for end_point in (first, last) for corner in corners])
    return points, BAR_SIDES
