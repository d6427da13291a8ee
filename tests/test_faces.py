"""Model packs, detection and embedding: equal to insightface on the same files, and clear about bad ones."""

import cv2
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from insightface.app import FaceAnalysis
from insightface.model_zoo import get_model
from torch import nn

from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError
from negfacediff_core.faces.detect import fit, load_detector, suppress_overlaps
from negfacediff_core.faces.detector_network import DetectorNetwork
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.faces.packs import find_network
from negfacediff_core.faces.train_detector import export_network


def export(network, path, shape, batch="batch"):
    torch.onnx.export(
        network.eval(),
        (torch.zeros(shape),),
        path,
        input_names=["data"],
        dynamic_axes={"data": {0: batch}} if batch else None,
        dynamo=False,
    )


def smooth_images(count, height, width):
    coarse = np.random.default_rng([height, width]).integers(0, 256, (count, 7, 7, 3), np.uint8)
    return np.stack([cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) for image in coarse])


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """A pack of random networks: a detector that finds many faces, a recogniser, two of other kinds."""
    folder = tmp_path_factory.mktemp("pack")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        detector = DetectorNetwork()
        recogniser = nn.Sequential(
            nn.Conv2d(3, 8, 7, 4), nn.ReLU(), nn.AvgPool2d(9), nn.Flatten(), nn.Linear(72, 16)
        )
        landmark_network = nn.Sequential(nn.AvgPool2d(64), nn.Flatten())
        for head in detector.heads:
            nn.init.normal_(head.outputs[0].weight, std=0.3)
            nn.init.zeros_(head.outputs[0].bias)
    export_network(detector, folder / "detector.onnx")
    export(recogniser, folder / "recogniser.onnx", (1, 3, 112, 112))
    export(landmark_network, folder / "landmark.onnx", (1, 3, 192, 192))
    export(landmark_network, folder / "attribute.onnx", (1, 3, 96, 96))
    return folder


@pytest.fixture(scope="module")
def oracle(pack):
    analysis = FaceAnalysis(name=str(pack), providers=["CPUExecutionProvider"])
    analysis.prepare(ctx_id=-1, det_thresh=0.5, det_size=(128, 128))
    return analysis


def test_insightface_loads_the_pack(oracle):
    assert {"detection", "recognition"} <= set(oracle.models)
    assert oracle.models["detection"].use_kps


def test_faces_equal_insightface(pack, oracle):
    images = smooth_images(6, 128, 128)
    found = load_detector(pack).detect(images)
    assert sum(len(faces.scores) for faces in found) > 20
    for image, faces in zip(images, found, strict=True):
        boxes, landmarks = oracle.det_model.detect(image[..., ::-1])
        np.testing.assert_allclose(np.column_stack([faces.boxes, faces.scores]), boxes, atol=2e-3)
        np.testing.assert_allclose(faces.landmarks, landmarks, atol=2e-3)
        assert (np.diff(faces.scores) <= 0).all()


@pytest.mark.parametrize("shape", [(64, 64), (96, 150), (200, 90)])
def test_other_sizes_are_fitted_as_insightface_does(pack, oracle, shape):
    images = smooth_images(3, *shape)
    frames, scale = fit(images, (128, 128))
    assert scale == pytest.approx(int(128 * shape[0] / max(shape)) / shape[0])
    for image, faces, frame in zip(images, load_detector(pack).detect(images), frames, strict=True):
        height, width = round(shape[0] * scale), int(128 * shape[1] / max(shape))
        resized = cv2.resize(image, (width, height))
        assert np.abs(frame[:height, :width].astype(int) - resized).max() <= 1
        assert not frame[height:].any() and not frame[:, width:].any()
        boxes, _ = oracle.det_model.detect(image[..., ::-1])
        # A random network ties: which of two equal scores is first turns on the last bit of the resizing.
        distances = np.abs(boxes[:, :4] - faces.boxes[0]).max(axis=1)
        assert distances.min() < 0.5


def test_detection_is_independent_of_the_batch(pack):
    images = smooth_images(35, 64, 64)
    detector = load_detector(pack)
    together = detector.detect(images)
    for index in (0, 31, 32, 34):
        (alone,) = detector.detect(images[index : index + 1])
        np.testing.assert_allclose(alone.boxes, together[index].boxes, atol=2e-3)


def test_embeddings_equal_insightface(pack, oracle):
    crops = smooth_images(5, 112, 112)
    embedder = load_embedder(pack)
    expected = oracle.models["recognition"].get_feat([crop[..., ::-1] for crop in crops])
    np.testing.assert_allclose(embedder.embed(crops), expected, atol=1e-4)
    assert embedder.width == 16 and embedder.input_size == 112
    assert embedder.mean == embedder.std == 127.5
    mirrored = embedder.embed(crops) + embedder.embed(crops[:, :, ::-1])
    np.testing.assert_allclose(embedder.embed(crops, flip=True), mirrored, atol=1e-5)
    swapped = load_embedder(pack, colour_order="BGR").embed(crops[..., ::-1])
    np.testing.assert_allclose(swapped, expected, atol=1e-4)


def test_no_images_give_no_results(pack):
    assert load_detector(pack).detect(np.zeros((0, 64, 64, 3), np.uint8)) == []
    assert load_embedder(pack).embed(np.zeros((0, 112, 112, 3), np.uint8)).shape == (0, 16)


@pytest.mark.parametrize("batch", [None, "batch"])
def test_a_graph_that_normalises_or_fixes_its_batch(tmp_path, batch):
    class Normalising(nn.Module):
        def forward(self, data):
            return ((data - 127.5) * (1 / 128)).mean((2, 3))

    path = tmp_path / "recogniser.onnx"
    export(Normalising(), path, (1, 3, 112, 112), batch)
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = f"{node.op_type}_0"  # as converters from MXNet name them
    onnx.save(model, path)
    crops = smooth_images(3, 112, 112)
    embedder = load_embedder(path)
    assert (embedder.mean, embedder.std) == (0, 1)
    np.testing.assert_allclose(embedder.embed(crops), (crops.mean((1, 2)) - 127.5) / 128, atol=1e-4)
    oracle = get_model(str(path), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(embedder.embed(crops[:1]), oracle.get_feat(crops[0, ..., ::-1]), atol=1e-4)


def test_networks_say_which_weights_they_are(pack):
    detector = load_detector(pack)
    assert detector.weights == pack / "detector.onnx" == find_network(pack, "detection")
    assert len(detector.sha256) == 64 and detector.sha256 != load_embedder(pack).sha256
    assert detector.colour_order == "RGB" and detector.input_size == (128, 128)
    assert load_embedder(pack / "recogniser.onnx").weights == pack / "recogniser.onnx"


def test_missing_or_wrong_weights_are_named(pack, tmp_path):
    with pytest.raises(WeightsError, match="There is no"):
        load_detector(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"no \*\.onnx"):
        load_embedder(tmp_path)
    with pytest.raises(WeightsError, match=r"detector\.onnx \(detection\)"):
        load_embedder(pack / "detector.onnx")
    weights = (pack / "recogniser.onnx").read_bytes()
    for content in (weights[: len(weights) // 2], b"<html>not found</html>", b""):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(WeightsError, match=r"broken\.onnx"):
            load_embedder(tmp_path)


def test_impossible_settings_and_inputs_are_refused(pack):
    with pytest.raises(ConfigError, match="multiple of 32"):
        load_detector(pack, input_size=100)
    with pytest.raises(ConfigError, match="threshold"):
        load_detector(pack, threshold=1.5)
    with pytest.raises(NegFaceDiffError, match="float32"):
        load_detector(pack).detect(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(NegFaceDiffError, match="align"):
        load_embedder(pack).embed(np.zeros((1, 64, 64, 3), np.uint8))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_suppression_keeps_the_best_of_every_overlapping_group(seed, count):
    random = np.random.default_rng(seed)
    low = random.uniform(0, 60, (count, 2))
    boxes = np.concatenate([low, low + random.uniform(5, 40, (count, 2))], 1).astype(np.float32)
    kept = suppress_overlaps(boxes, 0.4)

    def overlap(a, b):
        shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + 1, 0, None).prod()
        return shared / ((a[2:] - a[:2] + 1).prod() + (b[2:] - b[:2] + 1).prod() - shared)

    assert (np.diff(kept) > 0).all()
    for index in range(count):
        better = [other for other in kept if other < index]
        suppressed = any(overlap(boxes[index], boxes[other]) > 0.4 for other in better)
        assert suppressed == (index not in kept)
