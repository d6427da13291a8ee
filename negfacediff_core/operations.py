"""How many floating-point operations networks take, counted on their layers and not by running them.

A multiply-add is two operations. Only matrix products and convolutions count, as in published figures: the
rest is bound by memory, and is part of what keeps a device below its matrix rate.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path

import onnx
import torch
from onnx.shape_inference import InferenceError, infer_shapes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from negfacediff_core.diffusion.first_stage import VQDecoder
from negfacediff_core.diffusion.unet import ConditionalUNet

GIGA = 1e9


@lru_cache(maxsize=32)
def unet_gflop(unet: ConditionalUNet, latent_shape: tuple[int, int, int], contexts: int) -> float:
    """Return 10^9 operations of one pass: one latent `(C, H, W)` with `contexts` projected contexts.

    `unet` is on the meta device. What no context touches is computed once a pass, and contexts are projected
    before it, so that two contexts take less than twice as much as one.
    """
    with torch.inference_mode(), torch.device("meta"):
        projected = unet.project_context(torch.zeros(contexts, unet.context_width))
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, *latent_shape), torch.zeros(1), projected)
    return counter.get_total_flops() / GIGA


@lru_cache(maxsize=32)
def decoder_gflop(decoder: VQDecoder, latent_shape: tuple[int, int, int]) -> float:
    """Return 10^9 operations of decoding one latent `(C, H, W)`; `decoder` is on the meta device.

    The codebook search is left out: it is a three-hundredth of them.
    """
    with torch.inference_mode(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, *latent_shape), quantize=False)
    return counter.get_total_flops() / GIGA


def module_gflop(module: nn.Module, item_shape: Sequence[int]) -> float:
    """Return 10^9 operations of one item of a network on the meta device, in evaluation mode."""
    with torch.inference_mode(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        module.eval()(torch.zeros(1, *item_shape))
    return counter.get_total_flops() / GIGA


def onnx_gflop(path: Path, side: int) -> float | None:
    """Return 10^9 operations of an ONNX network on one RGB image of `side` x `side` pixels.

    None where the shapes inside it cannot be told without running it.
    """
    graph = _with_shapes(path, side)
    if graph is None:
        return None
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0.0
    for node in graph.node:
        if node.op_type not in _PRODUCTS:
            continue
        needed = [shapes.get(name) for name in (node.input[0], node.input[1], node.output[0])]
        if not all(shape and all(shape) for shape in needed):
            return None
        total += _multiply_adds(node, *(shape or [] for shape in needed))
    return 2 * total / GIGA


_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def _multiply_adds(node: onnx.NodeProto, given: list[int], weight: list[int], made: list[int]) -> int:
    if node.op_type == "Conv":
        return prod(made) * prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return prod(given) * prod(weight[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return prod(made) * given[-2 if transposed else -1]


def _with_shapes(path: Path, side: int) -> onnx.GraphProto | None:
    """The graph with its input fixed to one image, and the shapes that follow from that."""
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    image = next(value for value in model.graph.input if value.name not in weights)
    for axis, size in zip(image.type.tensor_type.shape.dim, (1, 3, side, side), strict=True):
        axis.dim_value = size
    for value in model.graph.output:  # sizes declared for another input contradict those that follow
        value.type.tensor_type.ClearField("shape")
    try:
        return infer_shapes(model, data_prop=True).graph
    except InferenceError:
        return None
