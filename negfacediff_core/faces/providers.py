"""Where onnxruntime evaluates networks of faces: on the CPU, or on a GPU by its CUDA provider."""

from functools import lru_cache

import onnxruntime
import torch
from onnx import TensorProto, helper

from negfacediff_core.errors import ConfigError
from negfacediff_core.gpu_turns import turn_of

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_OPTIONS = {
    # left to itself it rounds to TensorFloat-32, which moves embeddings by a thousandth
    "use_tf32": "0",
    # the default times all kernels and may take others in every process
    "cudnn_conv_algo_search": "HEURISTIC",
    # the default doubles what it holds; the rest of the memory is sampling's
    "arena_extend_strategy": "kSameAsRequested",
}


def open_session(
    weights: bytes, device: str, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """Make a session that evaluates an ONNX network on `device`: cpu, cuda or cuda:N.

    Raises ConfigError, which says what to do, where onnxruntime cannot use the GPU: it would take the CPU and
    say so on the terminal alone. What it raises for a bad graph is its own.
    """
    if device == "cpu":
        return onnxruntime.InferenceSession(weights, options, providers=[CPU])
    if (what := missing_provider()) is not None:
        raise ConfigError(f"Networks of faces cannot run on {device}: {what}, or use the CPU.")
    on_gpu = {**_OPTIONS, "device_id": str(torch.device(device).index or 0)}
    with turn_of(device):
        torch.cuda.empty_cache()  # what PyTorch keeps for its next batch is lost to onnxruntime
        session = onnxruntime.InferenceSession(
            weights,
            options,
            # the CPU takes operators that the GPU's provider lacks
            providers=[(CUDA, on_gpu), CPU],
            enable_fallback=0,
        )
    if CUDA not in session.get_providers():
        raise ConfigError(
            f"Networks of faces cannot run on {device}: onnxruntime {onnxruntime.__version__} could not "
            f"start its {CUDA}, and says why on the terminal. It takes the libraries that PyTorch brings "
            f"({'CUDA ' + torch.version.cuda if torch.version.cuda else 'a build without CUDA'}): install an "
            "onnxruntime-gpu for the same CUDA, or use the CPU."
        )
    return session


def missing_provider() -> str | None:
    """Say what to do where the onnxruntime that is installed is one for CPUs alone; None where it is not."""
    available = onnxruntime.get_available_providers()
    if CUDA in available:
        return None
    return (
        f"onnxruntime has no {CUDA} here, only {', '.join(available)}; put the package for GPUs in its "
        "place, as the two cannot stand side by side (pip uninstall onnxruntime, then pip install "
        f"onnxruntime-gpu=={onnxruntime.__version__})"
    )


@lru_cache
def lacking_cuda(device: str) -> str | None:
    """Say why onnxruntime cannot use a GPU, cuda or cuda:N, and what to do; None where it can.

    A network of one operator is opened there, once a process.
    """
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "trial", ports[:1], ports[1:])
    # versions that every onnxruntime reads which the project takes
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    try:
        open_session(model.SerializeToString(), device)
    except ConfigError as error:
        return str(error)
    except Exception as error:  # onnxruntime raises a dozen unrelated types
        return f"Networks of faces cannot run on {device}: {error}"
    return None
