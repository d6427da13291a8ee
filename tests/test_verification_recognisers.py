"""Recognisers for verification: every kind of file, what they take, what is refused; many crops at a time."""

import io
import threading
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from face_networks import save_linear
from PIL import Image
from verification_material import colours, crop

from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.faces.packs import PIXELS
from negfacediff_core.images import to_float
from negfacediff_core.recognition.backbones import IRESNET_LAYERS, IResNet, build_backbone
from negfacediff_core.recognition.crop_lists import CropList, encoded_crops
from negfacediff_core.recognition.embedding import Embedding, check_size, embed_all, embedded_batches
from negfacediff_core.recognition.export import export_forms, write_checked, write_onnx
from negfacediff_core.recognition.recogniser_files import (
    _architecture,
    open_recogniser,
    open_recognisers,
)

TINY = {"family": "iresnet", "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "width": 6}
CROPS = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def network():
    """A tiny iResNet whose norms are not those that it starts with."""
    built = build_backbone(TINY, seed=1)
    with torch.no_grad():
        built.train()(to_float(CROPS))
    return built.eval()


@pytest.fixture(scope="module")
def expected(network):
    with torch.inference_mode():
        return network(to_float(CROPS)).numpy()


FORMS = {
    "state.pt": lambda weights: weights,
    "parallel.pth": lambda weights: {f"module.{key}": value for key, value in weights.items()},
    "nested.pt": lambda weights: {"state_dict": {f"backbone.{k}": v for k, v in weights.items()}, "epoch": 3},
    "checkpoint.pt": lambda weights: {"architecture": TINY, "backbone": weights, "step": 7},
    "arcface_torch.pt": lambda weights: {"epoch": 3, "state_dict_backbone": weights},
    "half.pt": lambda weights: {k: v.half() if v.is_floating_point() else v for k, v in weights.items()},
}


@pytest.mark.parametrize("name", FORMS)
def test_weights_of_an_iresnet_are_recognised_by_their_names_and_shapes(tmp_path, network, expected, name):
    torch.save(FORMS[name](network.state_dict()), tmp_path / name)
    found = open_recogniser(tmp_path / name)
    assert (found.width, found.input_size, found.colour_order) == (6, 112, "RGB")
    tolerance = 2e-2 if name == "half.pt" else 1e-5
    np.testing.assert_allclose(found.embed(CROPS), expected, atol=tolerance)


def test_the_folder_of_a_training_is_its_best_epoch(tmp_path, network, expected):
    folder = tmp_path / "trained"
    folder.mkdir()
    torch.save({"architecture": TINY, "backbone": network.state_dict()}, folder / "best.pt")
    torch.save({"backbone": {}}, folder / "state.pt")
    found = open_recognisers([str(folder)])
    np.testing.assert_allclose(found["trained"].embed(CROPS), expected, atol=1e-5)


def test_safetensors_and_onnx_give_the_same_embeddings(tmp_path, network, expected):
    safetensors.torch.save_file(network.state_dict(), tmp_path / "net.safetensors")
    (tmp_path / "pack").mkdir()
    write_onnx(network, tmp_path / "pack" / "net.onnx")
    pack = tmp_path / "pack"
    found = open_recognisers([f"{tmp_path}/net.safetensors", str(pack), f"{pack}/net.onnx,name=file"])
    assert list(found) == ["net", "pack", "file"]
    for one in found.values():
        np.testing.assert_allclose(one.embed(CROPS), expected, atol=1e-4)
        mirrored = one.embed(CROPS[:, :, ::-1])
        np.testing.assert_allclose(one.embed(CROPS, flip=True), expected + mirrored, atol=1e-4)
    assert found["pack"].sha256 == found["file"].sha256 != found["net"].sha256


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_colours_and_pixels_are_as_given(tmp_path, network, suffix, pixels):
    path = tmp_path / f"net{suffix}"
    torch.save(network.state_dict(), path) if suffix == ".pt" else write_onnx(network, path)
    (found,) = open_recognisers([f"{path},colour=bgr,pixels={pixels}"]).values()
    mean, std = PIXELS[pixels]
    planes = (CROPS[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) - mean) / std
    with torch.inference_mode():
        wanted = network(torch.from_numpy(planes.copy())).numpy()
    np.testing.assert_allclose(found.embed(CROPS), wanted, atol=1e-4, rtol=1e-3)


def test_both_forms_that_are_exported_give_the_same_embeddings(tmp_path, network, expected):
    """The form of SDFR takes pixels in 0 .. 1, which nobody has to say of it."""
    for path in export_forms(network, tmp_path):
        np.testing.assert_allclose(open_recogniser(path).embed(CROPS), expected, atol=1e-4)
        np.testing.assert_allclose(load_embedder(path.parent).embed(CROPS), expected, atol=1e-4)


def test_pixels_that_this_version_does_not_know_are_refused(tmp_path, network):
    write_checked(network, tmp_path / "net.onnx", pixels="0..65535")
    with pytest.raises(WeightsError, match=r"takes pixels in '0\.\.65535', .* upgrade negfacediff"):
        open_recogniser(tmp_path / "net.onnx")


class TwoOutputs(torch.nn.Module):
    """An embedding and its length, as AdaFace's networks have them, of a network that is no iResNet."""

    def __init__(self, side=112, flat=True):
        super().__init__()
        self.flat = flat
        self.layer = torch.nn.Conv2d(3, 4, side)

    def forward(self, crops):
        """Embed."""
        embeddings = self.layer(crops).flatten(1) if self.flat else self.layer(crops)
        return embeddings, embeddings.norm(dim=1)


def save_torchscript(path, network, side=112):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(network.eval(), torch.zeros(1, 3, side, side)).save(str(path))


def test_torchscript_is_a_recogniser_of_any_kind_where_its_code_may_run(tmp_path):
    network = TwoOutputs()
    save_torchscript(tmp_path / "net.pt", network)
    with pytest.raises(WeightsError, match=r"whose code would run: .*net\.pt,torchscript=yes"):
        open_recogniser(tmp_path / "net.pt")
    (found,) = open_recognisers([f"{tmp_path}/net.pt,colour=BGR,torchscript=yes"]).values()
    with torch.inference_mode():
        expected = network(to_float(CROPS[..., ::-1].copy()))[0].numpy()
    assert (found.width, found.input_size) == (4, 112)
    np.testing.assert_allclose(found.embed(CROPS), expected, atol=1e-5)
    np.testing.assert_allclose(
        found.embed(CROPS, flip=True), expected + found.embed(CROPS[:, :, ::-1]), atol=1e-5
    )


def test_torchscript_that_is_no_recogniser_is_refused(tmp_path):
    save_torchscript(tmp_path / "large.pt", TwoOutputs(160), side=160)
    save_torchscript(tmp_path / "maps.pt", TwoOutputs(100, flat=False))
    torch.save({}, tmp_path / "weights.pt")
    for name, reason in {
        "large": r"does not run on RGB crops \(N, 3, 112, 112\)",
        "maps": r"makes \(2, 4, 13, 13\) of two crops",
        "weights": "cannot be read as TorchScript",
        "none": "cannot be read as TorchScript",
    }.items():
        with pytest.raises(WeightsError, match=reason):
            open_recogniser(tmp_path / f"{name}.pt", torchscript=True)


@pytest.mark.parametrize("depth", [18, 34, 50, 100])
def test_published_depths_are_told_from_the_weights(depth):
    with torch.device("meta"):
        weights = IResNet(IRESNET_LAYERS[depth]).state_dict()
    assert _architecture(weights, None) == {
        "family": "iresnet",
        "layers": list(IRESNET_LAYERS[depth]),
        "channels": [64, 128, 256, 512],
        "width": 512,
    }


class Nothing:
    """A class that no file of weights may name."""


BAD_WEIGHTS = {
    "foreign": ({"input_layer.0.weight": torch.zeros(2)}, "another network than an iResNet .*input_layer"),
    "numbers": ({"conv1.weight": 3}, "is no state dict"),
    "list": ([torch.zeros(2)], "is no state dict"),
    "code": ({"conv1.weight": Nothing()}, "cannot be read as weights, as it holds more than tensors"),
    "adaface": (
        {"state_dict": {"model.input_layer.0.weight": torch.zeros(2), "head.kernel": torch.zeros(2)}},
        r"another network than an iResNet .*input_layer.*export it .* ONNX .* TorchScript",
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_weights_are_refused(tmp_path, kind, suffix):
    content, reason = BAD_WEIGHTS[kind]
    path = tmp_path / f"net{suffix}"
    torch.save(content, path)
    with pytest.raises(WeightsError, match=reason):
        open_recogniser(path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>", b"PK\x05\x06 cut short"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot be read as weights \(\w+\): expected a state dict"):
        open_recogniser(tmp_path / "net.pt")


def test_weights_that_do_not_fit_are_named(tmp_path, network):
    weights = network.state_dict()
    weights["layer2.0.se.weight"] = torch.zeros(3)
    torch.save(weights, tmp_path / "net.pt")
    with pytest.raises(WeightsError, match=r"another network than an iResNet .*layer2\.0\.se"):
        open_recogniser(tmp_path / "net.pt")


def test_what_is_said_of_a_recogniser_is_checked(tmp_path):
    save_linear(tmp_path / "a.onnx", 4)
    path = tmp_path / "a.onnx"
    for texts, reason in {
        (f"{path},colour=grey",): "colour is RGB or BGR",
        (f"{path},pixels=0-1",): r"pixels one of -1\.\.1, 0\.\.1, 0\.\.255",
        (str(path), str(path)): "two recognisers are called a",
        (f"{path},images=x",): "options name, colour, pixels and torchscript",
        (f"{path},torchscript=no",): "torchscript=yes lets the code .* run",
        (): "no recogniser is given",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            open_recognisers(texts)
    with pytest.raises(WeightsError, match="There is no"):
        open_recognisers([str(tmp_path / "none.pth")])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError):
            open_recognisers([str(path)], device="cuda")


class LeftHalf:
    """Embeds a crop as the mean colour of its left half; counts the threads that it is called from."""

    input_size, width = 112, 3

    def __init__(self, path):
        self.weights, self.threads = path, set()

    def embed(self, crops, flip=False):
        self.threads.add(threading.get_ident())
        left = crops[:, :, :56].mean(axis=(1, 2), dtype=np.float32)
        return left + crops[:, :, 56:].mean(axis=(1, 2), dtype=np.float32) if flip else left


@pytest.fixture
def crops():
    images = [crop(colour) for colour in colours(23)]
    return encoded_crops(images, [f"image {n}" for n in range(23)], "a set")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_embeddings_come_in_order_whatever_the_batch_and_threads(tmp_path, crops, batch, threads):
    told = []
    how = Embedding(LeftHalf(tmp_path), flip=False, batch=batch, threads=threads)
    found = embed_all(crops, how, told.append)
    np.testing.assert_array_equal(found, colours(23))
    assert sum(told) == 23 and len(told) == -(-23 // batch)
    both = embed_all(crops, how._replace(flip=True))
    np.testing.assert_array_equal(both, 2 * colours(23))


def test_crops_are_decoded_and_embedded_in_several_threads(tmp_path):
    meet = threading.Barrier(3, timeout=20)

    def read(place):
        if place < 3:
            meet.wait()
        return np.full((112, 112, 3), place + 1, np.uint8)

    embedder = LeftHalf(tmp_path)
    found = embed_all(CropList(list("abcdef"), read, 112), Embedding(embedder, False, batch=1, threads=3))
    assert found[:, 0].tolist() == [1, 2, 3, 4, 5, 6] and len(embedder.threads) == 3


def test_no_more_is_decoded_ahead_than_is_taken(tmp_path):
    started = []

    def read(place):
        started.append(place)
        return np.full((112, 112, 3), 9, np.uint8)

    names = [str(n) for n in range(100)]
    batches = embedded_batches(CropList(names, read, 112), Embedding(LeftHalf(tmp_path), batch=1, threads=2))
    next(batches)
    batches.close()
    assert len(started) <= 6


def test_an_embedding_without_a_direction_is_refused_and_named(tmp_path):
    dark = [crop((9, 9, 9)), crop((0, 0, 0))]
    with pytest.raises(NegFaceDiffError, match=r"gives second an embedding that is zero or not finite"):
        embed_all(encoded_crops(dark, ["first", "second"], "a set"), Embedding(LeftHalf(tmp_path)))


def test_a_crop_that_is_cut_short_is_named(tmp_path):
    noisy = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "PNG")
    cut = encoded_crops([buffer.getvalue()[:2000]], ["image 0"], "lfw.bin")
    with pytest.raises(NegFaceDiffError, match=r"lfw\.bin: image 0 cannot be read as an image"):
        embed_all(cut, Embedding(LeftHalf(tmp_path)))


def test_crops_of_another_size_are_refused_before_anything_is_embedded(tmp_path):
    small = encoded_crops([crop((1, 2, 3), 96)], ["image 0"], "a set")
    with pytest.raises(NegFaceDiffError, match=r"have 96x96 pixels, and net\.onnx takes 112x112"):
        check_size(small, LeftHalf(tmp_path / "net.onnx"), "lfw")
