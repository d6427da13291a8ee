"""Training, resuming and exporting a recogniser, on small random pictures."""

import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from crop_folders import TINY
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.faces.align import TEMPLATE_112, align
from negfacediff_core.images import to_float
from negfacediff_core.recognition.augment import AUGMENTATIONS, augment, pooled_crops
from negfacediff_core.recognition.export import export_recogniser, load_trained
from negfacediff_core.recognition.measure import embed_pooled_crops, held_out_figures
from negfacediff_core.recognition.train import TrainingSettings, read_checkpoint, train_recogniser

ARCHITECTURES = {
    "iresnet": TINY,
    "plain": {
        "family": "plain",
        "layers": [1, 1],
        "channels": [8, 16],
        "neck": 8,
        "width": 16,
        "input_pool": 4,
    },
}
SETTINGS = TrainingSettings(steps=6, batch_size=8, held_out=4, checkpoint_every=3, seed=5)


class Pictures(NamedTuple):
    """The part of a render set that training reads."""

    images: NDArray[np.uint8]
    landmarks: NDArray[np.float32]


def _pictures(identities: int, replicates: int) -> Pictures:
    """Each identity has a colour pattern in the upper half; the lower half changes with every image."""
    random = np.random.default_rng(0)
    patterns = random.uniform(40, 215, (identities, replicates, 8, 8, 3))
    patterns[:, :, :4] = patterns[:, :1, :4]
    images = patterns.repeat(8, 2).repeat(8, 3) + random.normal(0, 25, (identities, replicates, 64, 64, 3))
    template = (TEMPLATE_112 - 56) * (0.9 * 64 / 112) + 32
    landmarks = template + random.normal(0, 0.5, (identities, replicates, 5, 2))
    return Pictures(np.clip(images, 0, 255).astype(np.uint8), landmarks.astype(np.float32))


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    """Twelve identities, four images of each."""
    return _pictures(12, 4)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder / "checkpoint.pt")
    momenta = {f"momentum{i}": s["momentum_buffer"] for i, s in state["optimiser"]["state"].items()}
    return state["backbone"] | {"centres": state["centres"]} | momenta


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_resumed_training_equals_uninterrupted_bit_for_bit(
    family: str, pictures: Pictures, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[family]
    whole = train_recogniser(pictures, architecture, SETTINGS, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def interrupt(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_recogniser(pictures, architecture, SETTINGS, tmp_path / "parts", interrupt)
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 3
    steps = []
    resumed = train_recogniser(
        pictures, architecture, SETTINGS, tmp_path / "parts", lambda step, *_: steps.append(step)
    )
    assert steps == [4, 5, 6]
    first, second = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert whole["eer"] == resumed["eer"]
    assert not list(tmp_path.rglob("*.partial"))


def test_finished_training_only_reports(pictures: Pictures, tmp_path: Path) -> None:
    first = train_recogniser(pictures, ARCHITECTURES["plain"], SETTINGS, tmp_path)
    steps = []
    again = train_recogniser(pictures, ARCHITECTURES["plain"], SETTINGS, tmp_path, lambda *s: steps.append(s))
    assert steps == []
    assert again == first


def test_a_deadline_stops_early_and_the_same_call_goes_on(pictures: Pictures, tmp_path: Path) -> None:
    past = time.monotonic() - 1
    stopped = train_recogniser(pictures, ARCHITECTURES["plain"], SETTINGS, tmp_path, deadline=past)
    assert (stopped["step"], stopped["steps"]) == (0, 6)
    assert train_recogniser(pictures, ARCHITECTURES["plain"], SETTINGS, tmp_path)["step"] == 6


def test_training_separates_identities_it_never_saw(tmp_path: Path) -> None:
    many = _pictures(80, 6)
    long = dataclasses.replace(SETTINGS, steps=80, batch_size=32, held_out=20)
    untrained = dataclasses.replace(long, steps=1, learning_rate=1e-9)
    before = train_recogniser(many, ARCHITECTURES["plain"], untrained, tmp_path / "before")
    after = train_recogniser(many, ARCHITECTURES["plain"], long, tmp_path / "after")
    assert after["trained_identities"] == 60
    assert after["curve"][-1][1] < after["curve"][0][1]
    assert after["fdr"] > 2 * before["fdr"]
    assert after["eer"] < before["eer"] / 2


def test_training_leaves_global_randomness_alone(pictures: Pictures, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train_recogniser(pictures, ARCHITECTURES["iresnet"], SETTINGS, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_of_another_training_is_refused(pictures: Pictures, tmp_path: Path) -> None:
    train_recogniser(pictures, ARCHITECTURES["plain"], SETTINGS, tmp_path)
    with pytest.raises(ConfigError, match="settings differ"):
        train_recogniser(pictures, ARCHITECTURES["plain"], dataclasses.replace(SETTINGS, seed=6), tmp_path)
    with pytest.raises(ConfigError, match="architecture differ"):
        train_recogniser(pictures, ARCHITECTURES["iresnet"], SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"head": "softmax"}, "cosface, arcface"), ({"held_out": 11}, "Render more"), ({"steps": 0}, "1 step")],
)
def test_settings_that_cannot_work_are_refused(
    change: dict, words: str, pictures: Pictures, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train_recogniser(
            pictures, ARCHITECTURES["plain"], dataclasses.replace(SETTINGS, **change), tmp_path / "new"
        )
    assert not (tmp_path / "new").exists()


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="train the network first"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_checkpoint(tmp_path / "checkpoint.pt")
    torch.save({"backbone": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(WeightsError, match="no checkpoint of a recogniser"):
        export_recogniser(tmp_path / "checkpoint.pt", tmp_path / "pack" / "recogniser.onnx")
    assert not (tmp_path / "pack").exists()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_onnx_equals_torch_and_insightface_loads_it(family: str, pictures: Pictures, tmp_path: Path) -> None:
    model_zoo = pytest.importorskip("insightface.model_zoo")
    train_recogniser(pictures, ARCHITECTURES[family], SETTINGS, tmp_path)
    path = tmp_path / "pack" / "recogniser.onnx"
    export_recogniser(tmp_path / "checkpoint.pt", path)
    assert [p.name for p in path.parent.iterdir()] == ["recogniser.onnx"]

    crops = np.stack([align(pictures.images[i, 0], pictures.landmarks[i, 0]) for i in range(5)])
    with torch.inference_mode():
        expected = load_trained(tmp_path / "checkpoint.pt")(to_float(crops)).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"crops": to_float(crops).numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    recogniser = model_zoo.get_model(str(path), providers=["CPUExecutionProvider"])
    assert recogniser.taskname == "recognition"
    assert (recogniser.input_mean, recogniser.input_std) == (127.5, 127.5)
    # insightface takes BGR.
    found = recogniser.get_feat([crop[..., ::-1] for crop in crops])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_onnx_folds_batch_norm_into_convolutions(pictures: Pictures, tmp_path: Path) -> None:
    train_recogniser(pictures, ARCHITECTURES["plain"], SETTINGS, tmp_path)
    export_recogniser(tmp_path / "checkpoint.pt", tmp_path / "judge.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "judge.onnx").graph.node]
    assert kinds.count("Conv") == 3
    # Only the norm of the embedding is left.
    assert kinds.count("BatchNormalization") == 1


def test_pooled_crops_are_the_averaged_alignment(pictures: Pictures) -> None:
    crops = pooled_crops(pictures.images[:, 0], pictures.landmarks[:, 0], 4)
    assert crops.shape == (12, 28, 28, 3)
    exact = align(pictures.images[7, 0], pictures.landmarks[7, 0]).astype(float)
    average = exact.reshape(28, 4, 28, 4, 3).mean(axis=(1, 3))
    assert np.abs(crops[7] - average).max() <= 0.51


@pytest.mark.parametrize("vary", [augment, *(row[1] for row in AUGMENTATIONS)])
def test_augmentations_vary_deterministically_and_keep_shape(vary) -> None:
    crops = torch.rand(64, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    original = crops.clone()
    first = vary(crops, torch.Generator().manual_seed(1))
    assert torch.equal(crops, original)
    assert first.shape == crops.shape
    assert torch.equal(first, vary(crops, torch.Generator().manual_seed(1)))
    assert (first - crops).abs().mean() > 0.01
    # The variation is mild: every image stays closest to its own original.
    flat, varied = crops.flatten(1) - crops.mean(), first.flatten(1) - first.mean()
    mirrored = crops.flip(3).flatten(1) - crops.mean()
    nearest = torch.maximum(varied @ flat.T, varied @ mirrored.T).argmax(1)
    assert (nearest == torch.arange(64)).float().mean() > 0.9


def test_augmented_crops_stay_in_range() -> None:
    crops = torch.ones(64, 3, 28, 28)
    varied = augment(crops, torch.Generator().manual_seed(2))
    assert varied.abs().max() <= 1


def test_participation_ratio_counts_filled_dimensions() -> None:
    random = np.random.default_rng(0)
    means = np.zeros((2000, 1, 16), np.float32)
    means[..., :5] = random.normal(size=(2000, 1, 5))
    figures = held_out_figures(means + random.normal(0, 1e-3, (2000, 2, 16)).astype(np.float32))
    assert figures["participation_ratio"] == pytest.approx(5, abs=0.1)
    assert figures["genuine_mean"] == pytest.approx(1, abs=1e-3)
    assert figures["impostor_mean"] == pytest.approx(0, abs=0.02)


def test_embedding_crops_does_not_depend_on_the_batch(pictures: Pictures, tmp_path: Path) -> None:
    train_recogniser(pictures, ARCHITECTURES["plain"], SETTINGS, tmp_path)
    network = load_trained(tmp_path / "checkpoint.pt")
    crops = pooled_crops(pictures.images[:, 0], pictures.landmarks[:, 0], 4)
    together = embed_pooled_crops(network, crops)
    np.testing.assert_allclose(together, embed_pooled_crops(network, crops, batch_size=5), atol=1e-5)
