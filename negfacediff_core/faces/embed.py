"""Embeddings of aligned crops by the recogniser of a model pack."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.faces.packs import (
    PIXELS,
    ColourOrder,
    Network,
    check_crops,
    network_input,
    open_network,
)

BATCH = 32


class Embedder(Protocol):
    """Whatever turns aligned crops into embeddings, by which weights, from pixels (x - mean) / std."""

    weights: Path
    sha256: str
    colour_order: ColourOrder
    mean: float
    std: float
    input_size: int
    width: int

    def embed(self, crops: NDArray[np.uint8], flip: bool = False) -> NDArray[np.float32]:
        """Embed `(N, input_size, input_size, 3)` uint8 RGB crops as `(N, width)` float32, not normalised."""
        ...


class OnnxEmbedder:
    """A recogniser in ONNX. It takes the pixels that its file names, or else 0..255 if its graph normalises
    them, and -1..1 if not.
    """

    def __init__(self, network: Network, colour_order: ColourOrder = "RGB") -> None:
        assert network.size is not None  # a network of unknown size is never taken for a recogniser
        self._network = network
        self.weights = network.path
        self.sha256 = network.sha256
        self.colour_order: ColourOrder = colour_order
        self.input_size = network.size[0]
        self.mean, self.std = PIXELS[network.pixels or ("0..255" if network.normalises_inside else "-1..1")]
        blank = np.zeros((1, self.input_size, self.input_size, 3), np.uint8)
        self.width = self._run(blank).shape[1]

    def embed(self, crops: NDArray[np.uint8], flip: bool = False) -> NDArray[np.float32]:
        """Embed `(N, input_size, input_size, 3)` uint8 RGB crops as `(N, width)` float32, not normalised.

        `flip` adds the embedding of the mirrored crop, the usual form for verification. Raises
        NegFaceDiffError for crops of another shape or type.
        """
        check_crops(crops, self.input_size, self.weights.name)
        if not len(crops):
            return np.empty((0, self.width), np.float32)
        embeddings = self._run(crops)
        if flip:
            embeddings += self._run(crops[:, :, ::-1])
        return embeddings

    def _run(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        def prepare(some: NDArray[np.uint8]) -> NDArray[np.float32]:
            return network_input(some, self.mean, self.std, self.colour_order)

        outputs = self._network.evaluate(crops, self._network.batch or BATCH, prepare)
        return np.concatenate([embeddings for embeddings, *_ in outputs])


def load_embedder(
    source: str | Path,
    threads: int = 1,
    device: str = "cpu",
    colour_order: ColourOrder = "RGB",
) -> OnnxEmbedder:
    """Load the recogniser of a model-pack folder, or one ONNX file, onto cpu, cuda or cuda:N.

    Raises WeightsError if there is none, ConfigError for a GPU that onnxruntime cannot use.

    Every insightface pack wants RGB; `colour_order` is for networks trained on BGR, such as AdaFace's.
    """
    return OnnxEmbedder(open_network(source, "recognition", threads, device), colour_order)
