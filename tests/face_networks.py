"""Tiny ONNX networks of faces: another recogniser, a quality network, and attribute networks."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save_recogniser(folder, tiny_pack):
    """A pack with a recogniser as wide as the tiny judge, and with other weights."""
    folder.mkdir(parents=True)
    model = onnx.load(tiny_pack / "judge" / "judge.onnx")
    rng = np.random.default_rng(7)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(
                numpy_helper.from_array(rng.permutation(values.ravel()).reshape(values.shape), tensor.name)
            )
    onnx.save(model, folder / "recogniser.onnx")
    return folder


def save_linear(path, outputs, size=112, seed=0, rank=2, count=1):
    """A network that gives an image `outputs` numbers: a random linear map of its three mean colours.

    `rank` 1 gives `(N,)`; `count` repeats the output, which no network of faces may do.
    """
    weights = np.random.default_rng(seed).standard_normal((3, outputs)).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["colours"]),
        helper.make_node("MatMul", ["colours", "weights"], ["scores"]),
    ]
    names = ["scores"]
    if rank == 1:
        nodes.append(helper.make_node("Flatten", ["scores"], ["flat"], axis=0))
        nodes.append(helper.make_node("Squeeze", ["flat", "axes"], ["only"]))
        names = ["only"]
    nodes += [helper.make_node("Identity", [names[0]], [f"copy{n}"]) for n in range(1, count)]
    names += [f"copy{n}" for n in range(1, count)]
    shape = ["batch"] if rank == 1 else ["batch", outputs]
    graph = helper.make_graph(
        nodes,
        "faces",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([0], np.int64), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return weights
