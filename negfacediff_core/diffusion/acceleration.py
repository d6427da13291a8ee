"""Ways to evaluate the network: eagerly, as a CUDA graph, or compiled. The first that works is taken.

All are functions of (x, t, context) with the result of `ConditionalUNet.forward`. Shapes must stay the same
from call to call for a graph or a compiled network to pay.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from negfacediff_core.diffusion.blocks import ProjectedContext
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError

logger = logging.getLogger(__name__)

#: What each setting tries, in this order. A graph is captured in seconds, a compilation takes minutes and
#: pays in long builds alone. On a CPU compiling measured neutral, with 100 to 270 s of it.
ACCELERATIONS: dict[str, tuple[str, ...]] = {
    "eager": ("eager",),
    "graphs": ("graphs", "eager"),
    "compile": ("compile", "graphs", "eager"),
}

# Evaluations before a capture: libraries choose their kernels and allocate in the first ones.
_REHEARSALS = 3
# What other threads allocate meanwhile, as for networks that they load, leaves a capture alone.
_OWN_THREAD = "thread_local"
# Shapes whose graphs are kept; each has contexts and maps of its own.
_MOST_GRAPHS = 4


class Network(Protocol):
    """The noise predicted in `x` `(N, C, H, W)` at timestep t, for R = k N contexts: `(R, C, H, W)`."""

    def __call__(self, x: Tensor, t: int, context: ProjectedContext) -> Tensor:
        """Evaluate the network."""


def choose(acceleration: str, device: torch.device) -> tuple[str, ...]:
    """The ways to try; `auto` is graphs on a GPU and eager elsewhere. Raises `ConfigError`."""
    if acceleration == "auto":
        acceleration = "graphs" if device.type == "cuda" else "eager"
    if acceleration not in ACCELERATIONS:
        raise ConfigError(
            f"acceleration is {acceleration!r}; choose one of {', '.join(('auto', *ACCELERATIONS))}."
        )
    return ACCELERATIONS[acceleration]


class EagerNetwork:
    """Evaluates kernel by kernel. What a timestep steers by is computed when it is first met, and kept."""

    def __init__(self, unet: ConditionalUNet, evaluate: Callable[..., Tensor] | None = None):
        self.unet = unet
        self.evaluate = unet if evaluate is None else evaluate
        self._steering: dict[int, Tensor] = {}

    def steer(self, t: int) -> Tensor:
        """`ConditionalUNet.steer`, once a timestep."""
        if t not in self._steering:
            self._steering[t] = self.unet.steer(t)
        return self._steering[t]

    def __call__(self, x: Tensor, t: int, context: ProjectedContext) -> Tensor:
        """Evaluate the network."""
        return self.evaluate(x, self.steer(t), context)


@dataclass
class _Graph:
    """A captured evaluation, the memory that it reads and writes, and the context that lies there now."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    steering: Tensor
    context: ProjectedContext
    eps: Tensor
    holds: Callable[[], ProjectedContext | None]


class GraphedNetwork:
    """Replays a CUDA graph of the evaluation, one captured for each shape."""

    def __init__(self, eager: EagerNetwork):
        if not torch.cuda.is_available():
            raise RuntimeError("CUDA graphs need a GPU")
        self.eager = eager
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, x: Tensor, t: int, context: ProjectedContext) -> Tensor:
        """Evaluate the network."""
        shape = len(x), context.rows
        if shape not in self._graphs:
            while len(self._graphs) >= _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[shape] = self._capture(x, t, context)
        captured = self._graphs[shape]
        captured.x.copy_(x)
        captured.steering.copy_(self.eager.steer(t))
        if captured.holds() is not context:  # contexts are those of all steps of a batch
            captured.context.overwrite(context)
            captured.holds = weakref.ref(context)
        captured.graph.replay()
        return captured.eps.clone()  # the next replay writes there

    def _capture(self, x: Tensor, t: int, context: ProjectedContext) -> _Graph:
        x, steering, own = x.clone(), self.eager.steer(t).clone(), context.clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(_REHEARSALS):
                self.eager.evaluate(x, steering, own)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # both say which GPU it is; without, it would be the first one
        capturing = torch.cuda.graph(graph, self._pool, stream, capture_error_mode=_OWN_THREAD)
        with torch.cuda.device_of(x), capturing:
            eps = self.eager.evaluate(x, steering, own)
        eps.fill_(torch.nan)  # a replay that writes nothing must not pass for one
        return _Graph(graph, x, steering, own, eps, weakref.ref(context))


def _compiled(eager: EagerNetwork) -> Network:
    evaluate = torch.compile(eager.unet, dynamic=False)
    compiled = EagerNetwork(eager.unet, evaluate)
    return GraphedNetwork(compiled) if torch.cuda.is_available() else compiled


_MAKERS: dict[str, Callable[[EagerNetwork], Network]] = {
    "eager": lambda eager: eager,
    "graphs": GraphedNetwork,
    "compile": _compiled,
}


class Accelerated:
    """Evaluates the network in the first of several ways that works and agrees with eager evaluation.

    Each shape's first evaluation is made eagerly as well. Where a way fails, or its result differs by more
    than `tolerance` (relative, of Euclidean norms), the next is taken from then on, and the log says why.
    `way` is the one in use, `warm_up` the seconds spent on first evaluations.
    """

    def __init__(self, unet: ConditionalUNet, ways: tuple[str, ...], tolerance: float):
        self.eager = EagerNetwork(unet)
        self.tolerance = tolerance
        self.warm_up = 0.0
        self.way, *self._others = ways
        self._network: Network | None = None
        self._trusted: set[tuple[torch.Size, int]] = set()
        # threads that share an engine on a CPU would each give up a way that fails
        self._trying = threading.Lock()

    def __call__(self, x: Tensor, t: int, context: ProjectedContext) -> Tensor:
        """Evaluate the network."""
        if self.way == "eager":
            return self.eager(x, t, context)
        shape = x.shape, context.rows
        if self._network is not None and shape in self._trusted:
            return self._network(x, t, context)
        with self._trying:
            begun = time.perf_counter()
            try:
                return self._first(x, t, context)
            finally:
                self.warm_up += time.perf_counter() - begun

    def forget(self) -> None:
        """Give up graphs and compiled networks, whose shapes will not come again, and their memory."""
        self._network = None
        self._trusted.clear()

    def _first(self, x: Tensor, t: int, context: ProjectedContext) -> Tensor:
        expected = self.eager(x, t, context)
        while self.way != "eager":
            try:
                if self._network is None:
                    self._network = _MAKERS[self.way](self.eager)
                found = self._network(x, t, context)
                difference = relative_difference(found, expected)
            except torch.OutOfMemoryError:
                raise  # a smaller batch may do
            except Exception as error:  # compilers and drivers raise whatever they like
                reason = " ".join(f"{type(error).__name__}: {error}".splitlines()[:1])
            else:
                # where float16 overflows, both ways do
                if difference <= self.tolerance or not expected.isfinite().all():
                    self._trusted.add((x.shape, context.rows))
                    return found
                reason = f"it differs by {difference:.1e} from eager evaluation; {self.tolerance:.0e} may be"
            self.forget()
            failed, self.way = self.way, self._others.pop(0)
            logger.warning("the network is evaluated by %s, not by %s: %s", self.way, failed, reason)
        return expected


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float32; NaN where a value is not finite."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
