"""Ways to evaluate the network. CUDA graphs are stood in for by one that runs what was captured again."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from diffusion_reference import TINY_MODEL, randomised

from negfacediff_core.diffusion import acceleration
from negfacediff_core.diffusion.acceleration import Accelerated, EagerNetwork, GraphedNetwork, choose
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def unet():
    return randomised(ConditionalUNet(**TINY_MODEL))


@pytest.fixture
def inputs(unet):
    with torch.inference_mode():
        return torch.randn(2, 3, 8, 8), 40, unet.project_context(torch.randn(4, 16))


@pytest.fixture
def ways(monkeypatch):
    """The table of ways, to be filled by the test."""
    table = {"eager": lambda eager: eager}
    monkeypatch.setattr(acceleration, "_MAKERS", table)
    return table


def broken(x, t, context):
    raise RuntimeError("no such kernel\nand a long story")


def test_a_device_has_its_own_default():
    assert choose("auto", CPU) == ("eager",) and choose("auto", CUDA) == ("graphs", "eager")
    assert choose("compile", CUDA) == ("compile", "graphs", "eager")
    with pytest.raises(ConfigError, match="acceleration is 'fast'; choose one of auto, eager"):
        choose("fast", CUDA)


@torch.inference_mode()
def test_a_way_that_agrees_is_taken_and_its_first_evaluation_of_a_shape_counted_apart(unet, inputs, ways):
    calls = []
    ways["quick"] = lambda eager: lambda *given: calls.append(1) or eager(*given) * (1 + 1e-6)
    network = Accelerated(unet, ("quick", "eager"), 1e-4)
    expected = network.eager(*inputs)
    assert torch.allclose(network(*inputs), expected, rtol=1e-5)
    warm_up = network.warm_up
    assert network.way == "quick" and warm_up > 0
    network(*inputs)
    assert network.warm_up == warm_up and len(calls) == 2
    network(inputs[0][:1], *inputs[1:])  # four contexts of one latent are another shape
    assert network.warm_up > warm_up


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (lambda eager: broken, "RuntimeError: no such kernel"),
        (lambda eager: broken(0, 0, 0), "RuntimeError: no such kernel"),
        (lambda eager: lambda *given: eager(*given) * 1.01, "differs by 1.0e-02 from eager evaluation"),
        (lambda eager: lambda *given: eager(*given) * torch.nan, "differs by nan"),
    ],
    ids=["fails", "cannot be made", "is off", "is not finite"],
)
@torch.inference_mode()
def test_what_fails_or_is_off_is_replaced_with_a_message(unet, inputs, ways, caplog, way, reason):
    ways |= {"quick": way, "slower": lambda eager: lambda *given: eager(*given)}
    network = Accelerated(unet, ("quick", "slower", "eager"), 1e-4)
    assert torch.equal(network(*inputs), network.eager(*inputs))
    assert network.way == "slower"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text and "by slower, not by quick" in caplog.text
    assert "long story" not in caplog.text


@torch.inference_mode()
def test_nothing_is_left_but_eager_where_all_fail(unet, inputs, ways, caplog):
    ways |= {"quick": lambda eager: broken, "slower": lambda eager: broken}
    network = Accelerated(unet, ("quick", "slower", "eager"), 1e-4)
    assert torch.equal(network(*inputs), network.eager(*inputs))
    assert network.way == "eager" and len(caplog.records) == 2


@torch.inference_mode()
def test_threads_that_share_a_network_give_up_a_way_once(unet, inputs, ways, caplog):
    together = threading.Barrier(4)

    def slow_to_fail(eager):
        time.sleep(0.05)
        raise RuntimeError("no such kernel")

    ways |= {"quick": slow_to_fail, "slower": lambda eager: lambda *given: eager(*given)}
    network = Accelerated(unet, ("quick", "slower", "eager"), 1e-4)

    def evaluate(_):
        together.wait()
        with torch.inference_mode():
            return network(*inputs)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(evaluate, range(4)))
    assert all(torch.equal(one, network.eager(*inputs)) for one in found)
    assert network.way == "slower" and len(caplog.records) == 1


@torch.inference_mode()
def test_too_little_memory_is_no_reason_to_take_another_way(unet, inputs, ways):
    def full(*given):
        raise torch.OutOfMemoryError("full")

    ways["quick"] = lambda eager: full
    network = Accelerated(unet, ("quick", "eager"), 1e-4)
    with pytest.raises(torch.OutOfMemoryError):
        network(*inputs)
    assert network.way == "quick"


@torch.inference_mode()
def test_graphs_without_a_gpu_fall_back(unet, inputs, caplog):
    network = Accelerated(unet, choose("graphs", CPU), 1e-4)
    assert torch.equal(network(*inputs), network.eager(*inputs))
    assert "by eager, not by graphs: RuntimeError: CUDA graphs need a GPU" in caplog.text


@pytest.mark.slow
@torch.inference_mode()
def test_the_network_can_be_compiled(monkeypatch):
    # traced as a compiler would, but run as it is: compiling takes minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    unet = randomised(ConditionalUNet(**TINY_MODEL | {"channel_multipliers": (1,), "is_attention": (True,)}))
    network = Accelerated(unet, choose("compile", CPU), 1e-4)
    for t in (40, 7):
        x, context = torch.randn(2, 3, 8, 8), unet.project_context(torch.randn(4, 16))
        assert torch.allclose(network(x, t, context), network.eager(x, t, context), atol=1e-5)
    assert network.way == "compile"


class Replaying:
    """Stands in for a CUDA graph: runs the captured evaluation again, on the memory that it was given."""

    captures = 0

    def replay(self):
        self.out.copy_(self.evaluate(*self.given))


@pytest.fixture
def graphed(unet, monkeypatch):
    eager = EagerNetwork(unet)
    last = []

    def evaluate(*given):
        out = unet(*given)
        last[:] = [given, out]
        return out

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert isinstance(stream, Stream) and capture_error_mode == "thread_local"
        yield
        graph.evaluate, (graph.given, graph.out) = unet, last
        Replaying.captures += 1

    class Stream:
        def wait_stream(self, other):
            pass

    eager.evaluate = evaluate
    Replaying.captures = 0
    for name, value in {
        "is_available": lambda: True,
        "graph_pool_handle": tuple,
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: Stream(),
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Replaying,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return GraphedNetwork(eager)


@torch.inference_mode()
def test_a_graph_is_captured_once_a_shape_and_reads_what_it_is_given(unet, graphed):
    kept = []
    for rows, contexts in ((2, 4), (2, 2), (2, 4), (1, 4)):
        context = unet.project_context(torch.randn(contexts, 16))
        for t in (40, 7):
            x = torch.randn(rows, 3, 8, 8)
            kept.append((graphed(x, t, context), unet(x, t, context)))
    assert Replaying.captures == 3
    for found, expected in kept:  # what was returned stays, whatever was replayed since
        assert torch.equal(found, expected)


@torch.inference_mode()
def test_only_some_graphs_are_kept(unet, graphed):
    for rows in (1, 2, 3, 4, 5, 5, 2):
        x, context = torch.randn(rows, 3, 8, 8), unet.project_context(torch.randn(rows, 16))
        assert torch.equal(graphed(x, 40, context), unet(x, 40, context))
    assert Replaying.captures == 5
    graphed(torch.randn(1, 3, 8, 8), 40, unet.project_context(torch.randn(1, 16)))
    assert Replaying.captures == 6


@torch.inference_mode()
def test_a_graph_that_holds_nothing_is_not_taken(unet, graphed, ways, caplog, monkeypatch):
    monkeypatch.setattr(Replaying, "replay", lambda self: None)
    ways["graphs"] = lambda eager: graphed
    network = Accelerated(unet, ("graphs", "eager"), 1e-4)
    x, context = torch.randn(2, 3, 8, 8), unet.project_context(torch.randn(2, 16))
    assert torch.equal(network(x, 40, context), unet(x, 40, context))
    assert network.way == "eager" and "differs by nan" in caplog.text
