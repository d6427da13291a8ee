"""A trained recogniser as the ONNX file of an insightface model pack."""

import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from negfacediff_core.errors import WeightsError
from negfacediff_core.explained import explained
from negfacediff_core.faces.packs import PIXELS_KEY
from negfacediff_core.recognition.backbones import INPUT_SIZE, IResNet, PlainNet, build_backbone
from negfacediff_core.recognition.train import read_checkpoint

OPSET = 17
TOLERANCE = 1e-4


def load_trained(checkpoint: Path) -> IResNet | PlainNet:
    """Rebuild the network of a training checkpoint, for evaluation. Raises WeightsError."""
    state = read_checkpoint(checkpoint)
    try:
        backbone = build_backbone(state["architecture"])
        backbone.load_state_dict(state["backbone"])
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"{checkpoint} is no checkpoint of a recogniser's training: {error}.") from error
    return backbone.eval()


def export_recogniser(checkpoint: Path, path: Path, projection: nn.Linear | None = None) -> None:
    """Write the network of a training checkpoint to `path` as ONNX, whole or not at all.

    `projection` is a further last layer, as `fit_projection` makes it.

    One input `(N, 3, 112, 112)` float32 RGB, one output `(N, width)`, not normalised. Whoever loads it
    scales pixels by (x - 127.5) / 127.5, as insightface does for a graph that does not start by subtracting
    and multiplying. Raises WeightsError where the checkpoint cannot be read, or if onnxruntime disagrees
    with torch.
    """
    backbone = load_trained(checkpoint)
    write_checked(backbone if projection is None else nn.Sequential(backbone, projection).eval(), path)


class UnitPixels(nn.Module):
    """Pixels in [0, 1] to those in [-1, 1] that networks take: SDFR wants it inside the graph."""

    def forward(self, crops: Tensor) -> Tensor:
        """Scale `(N, 3, H, W)` crops."""
        return 2 * crops - 1


def export_forms(network: nn.Module, folder: Path) -> list[Path]:
    """Write a network as ONNX in both forms that others read, and return the files.

    `pack/recogniser.onnx` is a model pack for insightface (see `export_recogniser`). `sdfr/recogniser.onnx`,
    for the challenge SDFR, takes RGB in [0, 1], holds the normalisation, and says so (PIXELS_KEY). Raises
    WeightsError.
    """
    network = network.cpu().eval()
    pack, sdfr = paths = [folder / name / "recogniser.onnx" for name in ("pack", "sdfr")]
    write_checked(network, pack)
    write_checked(nn.Sequential(UnitPixels(), network).eval(), sdfr, pixels="0..1")
    return paths


def write_checked(network: nn.Module, path: Path, pixels: str | None = None) -> None:
    """Write a network to `path` as ONNX, whole or not at all; WeightsError if onnxruntime disagrees.

    `pixels` is the row of PIXELS that it takes, where that is not -1..1: the file says so.
    """
    partial = path.with_suffix(".partial")
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_onnx(network, partial)
            if pixels is not None:
                model = onnx.load(partial)
                onnx.helper.set_model_props(model, {PIXELS_KEY: pixels})
                onnx.save(model, partial)
            _check_agreement(network, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_onnx(network: nn.Module, path: Path) -> None:
    """Trace a network in evaluation mode to an ONNX file with a free batch size."""
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript; this one is deprecated, and there under the pinned torch.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, INPUT_SIZE, INPUT_SIZE),),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["crops"],
            output_names=["embeddings"],
            dynamic_axes={"crops": {0: "batch"}, "embeddings": {0: "batch"}},
        )


def _check_agreement(network: nn.Module, path: Path) -> None:
    """Compare onnxruntime with torch on noise; WeightsError if they differ."""
    crops = np.random.default_rng(0).uniform(-1, 1, (3, 3, INPUT_SIZE, INPUT_SIZE)).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(crops)).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(["embeddings"], {"crops": crops})[0]
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error < TOLERANCE:
        raise WeightsError(
            f"The exported recogniser differs from the trained one by {error:.1e} (allowed {TOLERANCE}): "
            "nothing was written. Train the network afresh, or check the versions of torch and onnxruntime."
        )
