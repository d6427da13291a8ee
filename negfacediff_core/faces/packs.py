"""Networks of an insightface model pack: a folder of ONNX files, told apart by their inputs and outputs."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError
from negfacediff_core.faces.providers import open_session
from negfacediff_core.gpu_turns import turn_of
from negfacediff_core.stopping import heed

Task = Literal["detection", "recognition"]
ColourOrder = Literal["RGB", "BGR"]

#: Ranges of the pixels that a network takes, by name: x -> (x - mean) / std of 0..255.
PIXELS: dict[str, tuple[float, float]] = {
    "-1..1": (127.5, 127.5),
    "0..1": (0.0, 255.0),
    "0..255": (0.0, 1.0),
}
#: Where an ONNX file that this project exported says which row of PIXELS it takes, if not -1..1.
PIXELS_KEY = "negfacediff.pixels"

WANTED: dict[Task, str] = {
    "detection": "an SCRFD face detector (6, 9, 10 or 15 outputs)",
    "recognition": "a face recogniser (one output; a square input of at least 112, a multiple of 16)",
}

# Input of a network that is prepared for one turn of a GPU: 1,300 images of 128 x 128.
TURN_BYTES = 256 << 20


class Network(NamedTuple):
    """One ONNX network, ready to run, with what its graph declares. Sizes are None where they are dynamic."""

    path: Path
    sha256: str
    session: onnxruntime.InferenceSession
    input_name: str
    output_names: list[str]
    output_ranks: list[int]
    batch: int | None
    size: tuple[int, int] | None  # height, width
    normalises_inside: bool
    device: str
    pixels: str | None = None  # the row of PIXELS that the file says it takes

    def evaluate(
        self,
        images: NDArray[np.uint8],
        batch: int,
        prepare: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    ) -> Iterator[list[NDArray[np.float32]]]:
        """Evaluate the network on `(N, H, W, 3)` images; yields its outputs for each `batch` of them.

        `prepare` turns a batch into the network's input. On a GPU many batches are prepared for one turn of
        it: sampling holds its own for minutes. Raises StoppedError when nobody wants the outputs any more.
        """
        inputs: list[NDArray[np.float32]] = []
        most = 0 if self.device == "cpu" else TURN_BYTES
        for start in range(0, len(images), batch):
            inputs.append(prepare(images[start : start + batch]))
            if sum(one.nbytes for one in inputs) > most:
                yield from self._in_one_turn(inputs)
                inputs = []
        if inputs:
            yield from self._in_one_turn(inputs)

    def _in_one_turn(self, inputs: Sequence[NDArray[np.float32]]) -> list[list[NDArray[np.float32]]]:
        outputs = []
        with turn_of(self.device):
            for one in inputs:
                heed()
                outputs.append(self._evaluate_one(one))
        return outputs

    def _evaluate_one(self, one: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        feed = {self.input_name: one}
        try:
            return self.session.run(self.output_names, feed)
        except Exception:  # onnxruntime raises a dozen unrelated types
            if self.device == "cpu":
                raise
            torch.cuda.empty_cache()  # as where sessions are opened: it may be memory that was lacking
            return self.session.run(self.output_names, feed)


def open_network(source: str | Path, task: Task, threads: int = 1, device: str = "cpu") -> Network:
    """Open the network for `task` from an ONNX file or a model-pack folder.

    In a folder with several networks for the task, the first in order of file name is taken, as insightface
    does. Raises WeightsError, saying what was found and what is expected; further errors as `open_file`.
    """
    return open_file(find_network(Path(source), task), threads, device)


def open_file(path: Path, threads: int = 1, device: str = "cpu") -> Network:
    """Open one ONNX file, whatever it is for, on `device`: cpu, cuda or cuda:N.

    The session runs exactly the bytes that were hashed, on a CPU with `threads` threads inside an operator.
    Raises WeightsError for a file that is no network, and ConfigError for a GPU that onnxruntime cannot use.
    """
    weights = path.read_bytes()
    model = _parse(path, weights)
    graph = model.graph
    inputs = _inputs(graph)
    if not inputs or len(_dimensions(inputs[0])) != 4:
        raise WeightsError(
            f"{path} takes no images: the first input of its graph is not (batch, channels, height, width). "
            "Give a network of face images."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    try:
        session = open_session(weights, device, options)
    except ConfigError:
        raise
    except Exception as error:  # onnxruntime raises a dozen unrelated types for a bad graph
        raise WeightsError(f"{path} is an ONNX file that onnxruntime cannot run: {error}") from error
    batch, _, height, width = _dimensions(inputs[0])
    return Network(
        path=path,
        sha256=hashlib.sha256(weights).hexdigest(),
        session=session,
        input_name=session.get_inputs()[0].name,
        output_names=[output.name for output in session.get_outputs()],
        output_ranks=[len(output.shape) for output in session.get_outputs()],
        batch=batch,
        size=(height, width) if height and width else None,
        normalises_inside=_normalises_inside(graph),
        device=device,
        pixels=_pixels(path, model),
    )


def find_network(source: Path, task: Task) -> Path:
    """Return the ONNX file for `task`: `source` itself, or the first fitting file of the folder `source`."""
    if not source.exists():
        raise WeightsError(
            f"There is no {source}: expected an ONNX file, or an insightface model pack (a folder of ONNX "
            f"files) that holds {WANTED[task]}."
        )
    candidates = sorted(source.glob("*.onnx")) if source.is_dir() else [source]
    found = {}
    for path in candidates:
        found[path] = task_of(_parse(path, path.read_bytes()).graph)
        if found[path] == task:
            return path
    listing = ", ".join(f"{path.name} ({kind or 'neither'})" for path, kind in found.items())
    raise WeightsError(
        f"{source} holds no {task} network: expected {WANTED[task]}, found {listing or 'no *.onnx'}."
    )


def task_of(graph: onnx.GraphProto) -> Task | None:
    """Tell what a network is for from its inputs and outputs alone, by insightface's rule; None for the rest.

    A pack may also hold 106-point and 68-point landmark networks (input 192), which look like recognisers
    otherwise, and attribute networks (input 96).
    """
    inputs = _inputs(graph)
    if len(inputs) != 1 or len(_dimensions(inputs[0])) != 4:
        return None
    if len(graph.output) in (6, 9, 10, 15):
        return "detection"
    _, _, height, width = _dimensions(inputs[0])
    if height is None or height != width or len(graph.output) != 1:
        return None
    return "recognition" if height >= 112 and height % 16 == 0 and height != 192 else None


def check_crops(crops: NDArray[np.uint8], side: int, network: str) -> None:
    """Raise NegFaceDiffError unless `crops` are what a `network` takes: uint8 RGB `(N, side, side, 3)`."""
    if crops.ndim != 4 or crops.shape[1:] != (side, side, 3) or crops.dtype != np.uint8:
        raise NegFaceDiffError(
            f"Crops have shape {crops.shape} and type {crops.dtype}; {network} takes uint8 RGB of shape "
            f"(N, {side}, {side}, 3): align the faces to that size first."
        )


def network_input(
    images: NDArray[np.uint8], mean: float, std: float, colour_order: ColourOrder
) -> NDArray[np.float32]:
    """Turn `(N, H, W, 3)` uint8 RGB into `(N, 3, H, W)` float32: (x - mean) / std, channels as wanted."""
    ordered = images if colour_order == "RGB" else images[..., ::-1]
    planes = np.ascontiguousarray(ordered.transpose(0, 3, 1, 2), np.float32)
    planes -= mean
    planes /= std
    return planes


def _parse(path: Path, weights: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(weights)
    except DecodeError as error:
        raise WeightsError(
            f"{path} ({len(weights):,} bytes) is not a readable ONNX file: it is damaged, truncated or of "
            "another format. Fetch it again and compare its sha256."
        ) from error
    if not model.graph.node:
        raise WeightsError(
            f"{path} ({len(weights):,} bytes) holds no network: it is empty or not an ONNX file."
        )
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model.graph)):
        # it would be read from wherever this process stands, and is no part of what is hashed
        raise WeightsError(
            f"{path} keeps weights in another file, which is not read: store it as one file, with "
            "onnx.save(onnx.load(path), new_path)."
        )
    return model


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All stored tensors of a graph and of the graphs in its nodes."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield attribute.t
        yield from attribute.tensors
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    # Older exporters list the weights among the inputs.
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def _dimensions(value: onnx.ValueInfoProto) -> list[int | None]:
    return [dimension.dim_value or None for dimension in value.type.tensor_type.shape.dim]


def _pixels(path: Path, model: onnx.ModelProto) -> str | None:
    found = next((each.value for each in model.metadata_props if each.key == PIXELS_KEY), None)
    if found not in (None, *PIXELS):
        raise WeightsError(
            f"{path} says that it takes pixels in {found!r}, which this version does not know (known: "
            f"{', '.join(PIXELS)}): upgrade negfacediff, or export it anew."
        )
    return found


def _normalises_inside(graph: onnx.GraphProto) -> bool:
    """Whether the first nodes subtract and multiply, as in graphs from MXNet (insightface's rule)."""
    names = [node.name for node in graph.node[:8]]
    return any(name.startswith(("Sub", "_minus")) for name in names) and any(
        name.startswith(("Mul", "_mul")) for name in names
    )
