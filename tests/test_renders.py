"""The rendered-face source: deterministic pictures, exact landmarks, distinct identities, resumable sets."""

import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core.errors import ConfigError, StoreError, WeightsError
from negfacediff_core.faces.align import TEMPLATE_112
from negfacediff_core.renders import dataset
from negfacediff_core.renders.asset import load_asset
from negfacediff_core.renders.camera import ARCFACE_TEMPLATE, fit_similarity
from negfacediff_core.renders.dataset import load_render_set, render_set
from negfacediff_core.renders.identity import draw_identity
from negfacediff_core.renders.render import Render, render

SIZE = 32


def picture(seed: int, identity: int, replicate: int, size: int = SIZE) -> Render:
    return render(draw_identity(seed, identity), replicate, size=size)


def picture_bytes(case: tuple[int, int, int]) -> bytes:
    face = picture(*case)
    return face.image.tobytes() + face.landmarks.tobytes() + face.box.tobytes()


def test_asset_is_a_closed_head_in_its_frame() -> None:
    head = load_asset()
    left, right = (head.canonical[head.vertices_of[eye]].mean(0) for eye in (1, 2))
    np.testing.assert_allclose(left + right, 0, atol=1e-3)
    assert 5.5 < left[0] - right[0] < 7.0  # centimetres between adult pupils
    mouth = (head.canonical[head.mouth_left] + head.canonical[head.mouth_right]) / 2
    nose = head.canonical[head.nose_tip]
    assert nose[1] > mouth[1] > 0 > nose[2] > mouth[2]
    assert Path(dataset.ASSET_PATH).stat().st_size < 2_000_000


def test_damaged_asset_is_refused_in_words(tmp_path: Path) -> None:
    damaged = tmp_path / "head.npz"
    damaged.write_bytes(b"not an archive")
    with pytest.raises(WeightsError, match="build-asset"):
        load_asset(damaged)


def digest(case: tuple[int, int, int]) -> str:
    return hashlib.sha256(picture_bytes(case)).hexdigest()


@pytest.mark.parametrize("threads", ["1", "2"])
def test_order_process_and_threads_do_not_matter(monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    cases = [(0, 3, 1), (0, 3, 0), (7, 3, 1), (0, 2, 1), (0, 17, 0)]
    here = [digest(case) for case in cases]
    assert [digest(case) for case in reversed(cases)] == here[::-1]
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(digest, cases)) == here
    assert len(set(here)) == len(cases)


def test_neither_disturbs_nor_follows_global_randomness() -> None:
    np.random.seed(5)  # noqa: NPY002 - the global state is what is tested
    expected = np.random.random()  # noqa: NPY002
    first = picture(1, 2, 3)
    np.random.seed(5)  # noqa: NPY002
    second = picture(1, 2, 3)
    assert np.array_equal(first.image, second.image)
    assert np.random.random() == expected  # noqa: NPY002


def test_identities_differ_more_than_their_replicates() -> None:
    """Even the mean colour of the middle of the face tells identities apart."""
    patch = slice(SIZE // 3, 2 * SIZE // 3)
    described = []
    for identity in range(16):
        drawn = draw_identity(0, identity)
        images = [render(drawn, replicate, SIZE).image[patch, patch] / 255 for replicate in range(4)]
        described.append([np.log(image.mean((0, 1)) + 0.02) for image in images])
    points = np.array(described)
    within = points.var(axis=1).mean()
    between = points.mean(axis=1).var(axis=0).mean() - within / 4
    assert within > 1e-4  # replicates do differ
    assert between > 0.5 * within


def test_shapes_of_identities_differ_by_millimetres() -> None:
    heads = np.stack([draw_identity(0, identity).bare.vertices for identity in range(8)])
    face = load_asset().canonical[:, 1] > 0
    spread = np.linalg.norm(heads[:, face] - heads[:, face].mean(0), axis=2)
    assert 0.2 < spread.mean() < 2.0  # centimetres


@pytest.mark.parametrize("scale", [0.7, 0.9, 1.0])
def test_aligned_landmarks_lie_on_the_template(scale: float) -> None:
    size = 112
    target = (ARCFACE_TEMPLATE - 55.5) * scale + 55.5
    misses = []
    for identity in range(4):
        drawn = draw_identity(3, identity)
        landmarks = np.array([render(drawn, k, size, scale, shift=0.0).landmarks for k in range(4)])
        misses.append(np.linalg.norm(landmarks - target, axis=2).mean(1))
        centred = landmarks.mean(1) - target.mean(0)
        assert np.abs(centred).max() < 0.1 * size * 0.1  # only the zoom moves the mean of the points
    assert np.median(misses) < 6.0 * scale


def test_template_is_the_one_that_faces_are_aligned_to() -> None:
    np.testing.assert_array_equal(ARCFACE_TEMPLATE, TEMPLATE_112)


def test_landmarks_are_where_the_features_are() -> None:
    """Eyes are darker than the cheek below them, and the order is the template's."""
    checked = 0
    for identity in range(12):
        drawn = draw_identity(11, identity)
        face = render(drawn, 0, 112)
        x, y = face.landmarks.T
        assert x[0] < x[1] and x[3] < x[4]
        assert max(y[0], y[1]) < y[2] < min(y[3], y[4]) + 0.1 * 112
        grey = face.image.mean(2)
        eye = grey[int(y[0]) - 2 : int(y[0]) + 3, int(x[0]) - 2 : int(x[0]) + 3].min()
        cheek = np.median(grey[int(y[2]) - 2 : int(y[2]) + 3, int(x[0]) - 2 : int(x[0]) + 3])
        checked += eye < cheek
    assert checked >= 10


def test_box_holds_the_landmarks() -> None:
    for identity in range(6):
        drawn = draw_identity(2, identity)
        for replicate in range(4):
            face = render(drawn, replicate, SIZE)
            x0, y0, x1, y1 = face.box
            assert (face.landmarks >= [x0, y0]).all() and (face.landmarks <= [x1, y1]).all()


def test_range_of_scales_scatters_faces_inside_the_picture() -> None:
    size, smallest, largest = 48, 0.35, 0.7
    boxes, landmarks = [], []
    drawn = draw_identity(0, 1)
    for replicate in range(24):
        face = render(drawn, replicate, size, scale=(smallest, largest), shift=0.02)
        boxes.append(face.box)
        landmarks.append(face.landmarks)
    corners = np.array(boxes)
    assert corners.min() > -0.5 - 0.02 * size - 1e-3
    assert corners.max() < size - 0.5 + 0.02 * size + 1e-3
    heights = corners[:, 3] - corners[:, 1]
    assert heights.max() > 1.5 * heights.min()
    centres = np.array(landmarks).mean(1)
    assert centres.std(0).min() > 0.05 * size


@given(
    angle=st.floats(-3, 3),
    zoom=st.floats(0.1, 10),
    shift=st.complex_numbers(max_magnitude=100),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_similarity_is_recovered(angle: float, zoom: float, shift: complex, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(5, 2))
    z = zoom * np.exp(1j * angle) * (points[:, 0] + 1j * points[:, 1]) + shift
    target = np.stack([z.real, z.imag], axis=1)
    np.testing.assert_allclose(fit_similarity(points, target).apply(points), target, atol=1e-7)


@pytest.mark.parametrize(("size", "scale"), [(8, 0.9), (64, 0.0), (64, (1.0, 0.5))])
def test_impossible_geometry_is_refused(size: int, scale: float | tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="size"):
        render(draw_identity(0, 0), 0, size=size, scale=scale)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "BLOCK", 2)


def test_render_set_resumes_where_it_stopped(tmp_path: Path, small_blocks: None) -> None:
    seen: list[tuple[int, int]] = []
    arguments = {"seed": 4, "identities": range(10, 15), "replicates": 2, "size": 16, "workers": 1}
    render_set(tmp_path, **arguments, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    blocks = sorted(tmp_path.glob("block-*.npz"))
    assert [block.name for block in blocks] == ["block-00000.npz", "block-00001.npz", "block-00002.npz"]
    whole = load_render_set(tmp_path)
    assert whole.images.shape == (5, 2, 16, 16, 3)
    assert whole.identities.tolist() == [10, 11, 12, 13, 14]
    expected = render(draw_identity(4, 13), 1, 16)
    assert np.array_equal(whole.images[3, 1], expected.image)
    assert np.array_equal(whole.landmarks[3, 1], expected.landmarks)
    assert np.array_equal(whole.boxes[3, 1], expected.box)

    kept = {block: block.stat().st_mtime_ns for block in blocks if block != blocks[1]}
    blocks[1].unlink()
    with pytest.raises(StoreError, match="lacks 1 of 3"):
        load_render_set(tmp_path)
    seen.clear()
    render_set(tmp_path, **arguments, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 5)]
    assert {block: block.stat().st_mtime_ns for block in kept} == kept
    assert np.array_equal(load_render_set(tmp_path).images, whole.images)
    assert not list(tmp_path.glob(".*"))


def test_interrupted_block_leaves_nothing_behind(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(np, "savez", full_disk)
        with pytest.raises(OSError, match="no space"):
            render_set(tmp_path, 0, range(3), 1, size=16, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    render_set(tmp_path, 0, range(3), 1, size=16, workers=1)
    assert len(load_render_set(tmp_path).images) == 3


def test_other_settings_are_refused(tmp_path: Path) -> None:
    render_set(tmp_path, 0, range(2), 1, size=16, workers=1)
    with pytest.raises(ConfigError, match=r"scale 0\.9 there, 0\.8 asked for"):
        render_set(tmp_path, 0, range(2), 1, size=16, scale=0.8, workers=1)
    with pytest.raises(ConfigError, match="identities 2 there, 3 asked for"):
        render_set(tmp_path, 0, range(3), 1, size=16, workers=1)
    stored = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    (tmp_path / "settings.json").write_text(json.dumps({**stored, "asset": "another"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="asset"):
        render_set(tmp_path, 0, range(2), 1, size=16, workers=1)


@pytest.mark.parametrize("identities", [range(0), range(0, 6, 2), range(-1, 3)])
def test_impossible_identities_are_refused(tmp_path: Path, identities: range) -> None:
    with pytest.raises(ConfigError, match="consecutive"):
        render_set(tmp_path / "set", 0, identities, 1)
    assert not (tmp_path / "set").exists()


def test_impossible_geometry_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scale"):
        render_set(tmp_path / "set", 0, range(2), 1, scale=(0.5, 0.1))
    assert not (tmp_path / "set").exists()


def test_unreadable_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no render set"):
        load_render_set(tmp_path)
    render_set(tmp_path, 0, range(1), 1, size=16, workers=1)
    block = tmp_path / "block-00000.npz"
    block.write_bytes(block.read_bytes()[:100])
    with pytest.raises(StoreError, match="block-00000"):
        load_render_set(tmp_path)


def test_workers_do_not_change_a_pixel(tmp_path: Path, small_blocks: None) -> None:
    alone = render_set(tmp_path / "one", 5, range(4), 1, size=16, workers=1)
    together = render_set(tmp_path / "two", 5, range(4), 1, size=16, workers=2)
    assert np.array_equal(load_render_set(alone).images, load_render_set(together).images)
