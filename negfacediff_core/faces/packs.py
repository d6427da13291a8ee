"""Networks of an insightface model pack: a folder of ONNX files, told apart by their inputs and outputs."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError

Task = Literal["detection", "recognition"]
ColourOrder = Literal["RGB", "BGR"]

WANTED: dict[Task, str] = {
    "detection": "an SCRFD face detector (6, 9, 10 or 15 outputs)",
    "recognition": "a face recogniser (one output; a square input of at least 112, a multiple of 16)",
}


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


def open_network(
    source: str | Path, task: Task, threads: int = 1, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> Network:
    """Open the network for `task` from an ONNX file or a model-pack folder.

    In a folder with several networks for the task, the first in order of file name is taken, as insightface
    does. Raises WeightsError, saying what was found and what is expected; further errors as `open_file`.
    """
    return open_file(find_network(Path(source), task), threads, providers)


def open_file(path: Path, threads: int = 1, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Network:
    """Open one ONNX file, whatever it is for.

    The session runs exactly the bytes that were hashed, with `threads` threads inside an operator. Raises
    WeightsError for a file that is no network, and ConfigError for unknown providers.
    """
    unknown = sorted(set(providers) - set(onnxruntime.get_available_providers()))
    if unknown:
        raise ConfigError(
            f"onnxruntime has no provider {unknown} here; it has {onnxruntime.get_available_providers()}. "
            "Name one of those, or install an onnxruntime build that brings it."
        )
    weights = path.read_bytes()
    graph = _parse(path, weights).graph
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
        session = onnxruntime.InferenceSession(weights, options, providers=list(providers))
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


def _normalises_inside(graph: onnx.GraphProto) -> bool:
    """Whether the first nodes subtract and multiply, as in graphs from MXNet (insightface's rule)."""
    names = [node.name for node in graph.node[:8]]
    return any(name.startswith(("Sub", "_minus")) for name in names) and any(
        name.startswith(("Mul", "_mul")) for name in names
    )
