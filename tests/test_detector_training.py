"""The detector's training: its frames, its loss, exact resumption, and that it learns to find faces."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.faces.align import TEMPLATE_112
from negfacediff_core.faces.detect import MEAN, STD, decode, load_detector
from negfacediff_core.faces.detector_frames import EMPTY_KINDS, LabelledImages, draw_frames, place
from negfacediff_core.faces.detector_loss import assign, box_overlap, detection_loss, make_anchors
from negfacediff_core.faces.detector_network import ANCHORS, STRIDES, DetectorNetwork
from negfacediff_core.faces.train_detector import (
    CHECKPOINT,
    DetectorSettings,
    compare_faces,
    export_detector,
    train_detector,
)

TINY = DetectorSettings(steps=4, batch=6, size=64, warm_up=2, held_out=0.25, bfloat16=False)
COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0], [0, 250, 250]], np.uint8)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in convolutions depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn_faces(identities, replicates, side, seed=0):
    """Grey frames with a skin-coloured disc and a dot of its own colour at each landmark."""
    random = np.random.default_rng(seed)
    shape = (identities, replicates)
    images = np.full((*shape, side, side, 3), 90, np.uint8)
    landmarks, boxes = np.zeros((*shape, 5, 2), np.float32), np.zeros((*shape, 4), np.float32)
    rows, columns = np.mgrid[:side, :side]
    for index in np.ndindex(*shape):
        scale = random.uniform(0.5, 0.9) * side / 112
        corner = random.uniform(0, 1, 2) * (side - 112 * scale)
        points = TEMPLATE_112 * scale + corner
        centre = np.array([56, 66]) * scale + corner
        images[index][np.hypot(columns - centre[0], rows - centre[1]) < 46 * scale] = [220, 180, 160]
        for point, colour in zip(points, COLOURS, strict=True):
            images[index][np.hypot(columns - point[0], rows - point[1]) < 7 * scale] = colour
        landmarks[index] = points
        boxes[index] = np.concatenate([centre - 46 * scale, centre + 46 * scale])
    return SimpleNamespace(images=images, landmarks=landmarks, boxes=boxes)


def flat(faces):
    return LabelledImages(
        faces.images.reshape(-1, *faces.images.shape[2:]),
        faces.boxes.reshape(-1, 4),
        faces.landmarks.reshape(-1, 5, 2),
    )


@pytest.fixture(scope="module")
def sets():
    return {"frames": drawn_faces(8, 2, 96), "crops": drawn_faces(8, 2, 64, seed=1)}


def test_landmarks_follow_every_zoom_turn_shift_and_mirroring(sets):
    sources = [flat(faces) for faces in sets.values()]
    pixels, boxes, landmarks = place(sources, 40, 128, np.random.default_rng(0))
    middles = (boxes[:, 0, :2] + boxes[:, 0, 2:]) / 2
    size = boxes[:, 0, 2] - boxes[:, 0, 0]
    assert ((landmarks[:, 0] - middles[:, None]).norm(dim=-1) < 0.5 * size[:, None]).all()
    grid = torch.nn.functional.grid_sample(
        pixels, (landmarks + 0.5) / 64 - 1, align_corners=False, padding_mode="border"
    )[:, :, 0].transpose(1, 2)
    inside = ((landmarks[:, 0] > 4) & (landmarks[:, 0] < 123)).all(-1)
    # Mirroring swaps left and right points, so a landmark shows its own colour or that of its partner.
    own, partner = torch.from_numpy(COLOURS).float(), torch.from_numpy(COLOURS[[1, 0, 2, 4, 3]]).float()
    error = torch.minimum((grid - own).abs().amax((1, 2)), (grid - partner).abs().amax((1, 2)))
    assert inside.all(-1).sum() > 25
    assert (error[inside.all(-1)] < 60).all()
    assert (landmarks[:, 0, 0, 0] < landmarks[:, 0, 1, 0]).all()


def test_frames_depend_on_their_generator_alone(sets):
    sources = [flat(faces) for faces in sets.values()]
    first, again, other = (draw_frames(sources, 20, 128, np.random.default_rng([0, s])) for s in (5, 5, 6))
    for field, same in zip(first, again, strict=True):
        assert torch.equal(field, same)
    assert not torch.equal(first.pixels, other.pixels)
    assert first.present.sum(1).tolist() == [1] * 11 + [4] * 4 + [0] * 5
    assert first.pixels.min() >= (0 - MEAN) / STD and first.pixels.max() <= (255 - MEAN) / STD


@pytest.mark.parametrize("kind", EMPTY_KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", [0, 3])
def test_empty_frames_have_the_right_form(sets, kind, count):
    frames = kind([flat(faces) for faces in sets.values()], count, 64, np.random.default_rng(0))
    assert frames.shape == (count, 3, 64, 64)
    assert torch.isfinite(frames).all()


def test_every_face_gets_anchors_of_its_size_and_place():
    anchors = make_anchors(128)
    sizes = torch.tensor([8.0, 20.0, 33.0, 50.0, 90.0, 127.0])
    boxes = torch.zeros(1, 6, 4)
    middles = torch.tensor([[10.0, 10], [100, 20], [30, 80], [90, 90], [60, 60], [64, 64]])
    boxes[0] = torch.cat([middles - sizes[:, None] / 2, middles + sizes[:, None] / 2], 1)
    present = torch.tensor([[True] * 5 + [False]])
    positive, face, counts = assign(boxes, present, anchors)
    assert sorted(face[positive].unique().tolist()) == [0, 1, 2, 3, 4]
    assert (counts | ~positive).all() and not counts.all()
    large = anchors.strides[(positive & (face == 4))[0]]
    small = anchors.strides[(positive & (face == 1))[0]]
    assert large.min() >= 16 and small.max() == 8


def test_a_perfect_answer_costs_nothing_and_decodes_to_the_faces():
    anchors = make_anchors(128)
    boxes = torch.tensor([[[20.0, 30, 80, 100]]])
    landmarks = torch.from_numpy(TEMPLATE_112 * 0.5 + [22, 30]).float()[None, None]
    present = torch.ones(1, 1, dtype=torch.bool)
    positive, _, _ = assign(boxes, present, anchors)
    strides = anchors.strides[:, None]
    distances = torch.cat([anchors.centres - boxes[0, :, :2], boxes[0, :, 2:] - anchors.centres], 1) / strides
    offsets = ((landmarks[0] - anchors.centres[:, None]) / strides[..., None]).flatten(1)
    counts = [(128 // stride) ** 2 * ANCHORS for stride in STRIDES]
    maps = [positive.float()[..., None], distances[None], offsets[None]]
    outputs = [part for group in maps for part in group.split(counts, 1)]
    losses = detection_loss(outputs, boxes, landmarks, present, anchors)
    assert all(loss.item() == pytest.approx(0, abs=1e-4) for loss in losses.values())

    (faces,) = decode([maps.numpy() for maps in outputs], (128, 128), STRIDES, ANCHORS, 0.5, scale=2.0)
    np.testing.assert_allclose(faces.boxes, boxes[0] / 2, atol=1e-4)
    np.testing.assert_allclose(faces.landmarks, landmarks[0] / 2, atol=1e-4)


def test_frames_without_faces_have_a_finite_loss():
    anchors = make_anchors(64)
    outputs = DetectorNetwork().eval()(torch.zeros(2, 3, 64, 64))
    nothing = (torch.zeros(2, 4, 4), torch.zeros(2, 4, 5, 2), torch.zeros(2, 4, dtype=torch.bool))
    losses = detection_loss(outputs, *nothing, anchors)
    assert losses["box"].item() == losses["landmarks"].item() == 0
    assert 0 < losses["score"].item() < 1


def test_overlap_of_known_boxes():
    first = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 2, 2]])
    second = torch.tensor([[0.0, 0, 2, 2], [2, 0, 3, 1], [1, 1, 3, 3]])
    overlap, generalised = box_overlap(first, second)
    torch.testing.assert_close(overlap, torch.tensor([1, 0, 1 / 7]))
    torch.testing.assert_close(generalised, torch.tensor([1, -1 / 3, 1 / 7 - 2 / 9]))


class Interrupted(Exception):
    """Stands for a kill in the middle of training."""


def test_interrupted_training_resumes_to_the_same_weights(sets, tmp_path):
    def interrupt(step, steps, loss):
        if step == 3:
            raise Interrupted

    whole = train_detector(sets, tmp_path / "whole", TINY, save_every=2)
    with pytest.raises(Interrupted):
        train_detector(sets, tmp_path / "parts", TINY, save_every=2, progress=interrupt)
    steps = []
    resumed = train_detector(
        sets, tmp_path / "parts", TINY, save_every=2, progress=lambda step, total, loss: steps.append(step)
    )
    assert steps == [3, 4]
    assert resumed.keys() == whole.keys()
    np.testing.assert_equal(resumed, whole)
    states = [torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("whole", "parts")]
    for key, weights in states[0]["network"].items():
        assert torch.equal(weights, states[1]["network"][key]), key

    export_detector(tmp_path / "whole" / CHECKPOINT, tmp_path / "pack" / "detector.onnx")
    assert (tmp_path / "pack" / "detector.onnx").stat().st_size < 2_500_000
    assert len(load_detector(tmp_path / "pack").detect(flat(sets["crops"]).images)) == 16


def test_other_settings_or_a_damaged_checkpoint_are_refused(sets, tmp_path):
    train_detector(sets, tmp_path, replace(TINY, steps=1))
    with pytest.raises(ConfigError, match="other settings"):
        train_detector(sets, tmp_path, TINY)
    (tmp_path / CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(WeightsError, match="not a readable"):
        train_detector(sets, tmp_path, TINY)


def test_learning_lowers_the_loss(sets, tmp_path):
    losses = []
    settings = replace(TINY, steps=25, batch=8)
    train_detector(sets, tmp_path, settings, progress=lambda step, steps, loss: losses.append(loss))
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])


def test_recall_and_landmark_error_of_known_answers():
    faces = drawn_faces(1, 3, 64)
    truth = flat(faces)
    found = [
        SimpleNamespace(boxes=box[None], scores=np.ones(1), landmarks=points[None] + shift)
        for box, points, shift in zip(truth.boxes, truth.landmarks, ([0, 0], [3, 4], [0, 0]), strict=True)
    ]
    found[2] = SimpleNamespace(boxes=np.zeros((0, 4)), scores=np.zeros(0), landmarks=np.zeros((0, 5, 2)))
    figures = compare_faces(found, truth)
    eyes = np.linalg.norm(truth.landmarks[1, 1] - truth.landmarks[1, 0])
    assert figures["recall"] == pytest.approx(2 / 3)
    assert figures["landmark_error"] == pytest.approx(5 / eyes / 2, rel=1e-5)
