"""Inspection of model packs, and of single networks in ONNX."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch

from negfacediff_core.errors import WeightsError
from negfacediff_core.faces.detect import load_detector
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.faces.packs import Task, find_network, task_of
from negfacediff_core.weights.inspection import (
    MODEL_PACK,
    SINGLE_FILE,
    Inspection,
    Part,
    Trial,
    finite_or_not,
    hash_file,
    licence_of,
    tried,
)


def inspect_networks(source: Path) -> Inspection:
    """Inspect the ONNX networks of a model pack, or the one that `source` is."""
    paths = sorted(source.glob("*.onnx")) if source.is_dir() else [source]
    graphs = {path: _graph(path) for path in paths}
    used: dict[Task, Path] = {}
    for path, graph in graphs.items():
        task = task_of(graph) if graph else None
        if task:
            used.setdefault(task, path)  # the first in order of name, as insightface chooses
    roles = {path: task for task, path in used.items()}
    inspection = Inspection(
        kind=MODEL_PACK if source.is_dir() else SINGLE_FILE,
        facts={task: path.name for task, path in used.items()},
        parts=tuple(_part(path, graph, roles.get(path)) for path, graph in graphs.items()),
        files=tuple(hash_file(roles.get(path, "not used"), path) for path in paths),
        licence=licence_of(source),
    )
    damaged = [path for path, graph in graphs.items() if graph is None]
    try:
        if damaged or not used:
            find_network(damaged[0] if damaged else source, "recognition")  # says what it is and what to do
    except WeightsError as error:
        return replace(inspection, problem=str(error))
    return tried(inspection, _run_networks, used)


def _run_networks(used: Mapping[Task, Path]) -> Iterable[Trial]:
    """Run a pack's detector and recogniser on a blank image."""
    if "detection" in used:
        detector = load_detector(used["detection"])
        started = time.perf_counter()
        found = len(detector.detect(np.zeros((1, *detector.input_size, 3), np.uint8))[0].scores)
        height, width = detector.input_size
        outcome = f"{found} faces in a blank image of {height} x {width}"
        yield Trial("detection", time.perf_counter() - started, outcome)
    if "recognition" in used:
        embedder = load_embedder(used["recognition"])
        started = time.perf_counter()
        side = embedder.input_size
        embedding = embedder.embed(np.zeros((1, side, side, 3), np.uint8))
        finite = finite_or_not(torch.from_numpy(embedding))
        outcome = f"{finite}, {embedder.width} wide, of a crop of {side} x {side}"
        yield Trial("recognition", time.perf_counter() - started, outcome)


def _graph(path: Path) -> onnx.GraphProto | None:
    """The graph of an ONNX file; None if it is damaged."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # onnx raises a dozen unrelated types for a damaged file
        return None
    return graph if graph.node else None


def _part(path: Path, graph: onnx.GraphProto | None, task: Task | None) -> Part:
    if graph is None:
        return Part(path.name, 0, "", "damaged")
    parameters = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    types = {onnx.TensorProto.DataType.Name(tensor.data_type).lower() for tensor in graph.initializer}
    return Part(path.name, parameters, ", ".join(sorted(types)), task or "not used here")
