"""Stage `samples`: the contexts and negatives that the engine is given, and how contexts are turned."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from context_material import save_generator_with_empty_context
from stage_builds import EXECUTION, changed, make, planned

from negfacediff_core.config import ExecutionConfig
from negfacediff_core.diffusion.engine import SamplingEngine
from negfacediff_core.errors import ConfigError
from negfacediff_core.stages import samples
from negfacediff_core.stages.build import plan_build, run_unit
from negfacediff_core.stages.contexts import contexts_of
from negfacediff_core.stages.negatives import stored_negatives
from negfacediff_core.stages.samples import _cached_engine
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.shards import prepare, read_arrays, read_rows
from tasks.executors import check_available


@pytest.fixture
def given(monkeypatch):
    """What the engine was given, call by call."""
    calls, sample = [], SamplingEngine.sample

    def recording(engine, *rows):
        calls.append((engine, *rows))
        return sample(engine, *rows)

    monkeypatch.setattr(SamplingEngine, "sample", recording)
    return calls


def sampled(build, store, given):
    """Make the first unit of the samples; returns the stages and what the engine was given."""
    specs = make(build, store, stages=("contexts", "negatives"))
    prepare(specs["samples"])
    run_unit(specs["samples"], Unit(0, 0), EXECUTION)
    (call,) = given
    return specs, call


def test_the_engine_gets_every_negative_of_an_identity_and_its_share(tiny_build, tmp_path, given):
    build = changed(tiny_build, negatives__count=3, negatives__weights="rank")
    specs, (_, contexts, negatives, shares, identities, replicates, _) = sampled(build, tmp_path, given)
    stored = stored_negatives(specs["negatives"], np.arange(2))
    np.testing.assert_array_equal(identities, [0, 0, 1, 1])
    np.testing.assert_array_equal(replicates, [0, 1, 0, 1])
    for row, identity in enumerate(identities):
        own = contexts_of(specs["contexts"], np.array([identity]))[0]
        np.testing.assert_array_equal(contexts[row], own)
        others = contexts_of(specs["contexts"], stored.index[identity])
        np.testing.assert_array_equal(negatives[row], others)
        np.testing.assert_allclose(shares[row], np.array([6, 3, 2]) / 11, rtol=1e-6)
    rows = read_rows(specs["samples"], Unit(0, 0))
    assert rows.column("negative").to_pylist() == stored.index[identities, 0].tolist()


def test_the_null_negative_is_a_zero_vector_and_no_rule_is_no_negative(tiny_build, tmp_path, given):
    _, (_, _, negatives, shares, *_) = sampled(changed(tiny_build, negatives__rule="null"), tmp_path, given)
    assert negatives.shape == (4, 1, 16) and not negatives.any() and (shares == 1).all()
    given.clear()
    plain = changed(tiny_build, name="plain", negatives__rule="none", samples__w=0)
    _, (_, _, negatives, shares, *_) = sampled(plain, tmp_path, given)
    assert negatives is None and shares is None


@pytest.mark.parametrize("safe", [False, True])
def test_each_image_gets_a_context_of_its_own_within_the_bound(tiny_build, tmp_path, given, safe):
    build = changed(tiny_build, samples__transform="idperturb", samples__lower_bound=0.5, samples__safe=safe)
    specs, (_, contexts, _, _, identities, _, _) = sampled(build, tmp_path, given)
    everybody = contexts_of(specs["contexts"], np.arange(5))
    cosines = (everybody @ everybody.T)[identities]
    own = np.arange(5) == identities[:, None]
    found = (contexts * everybody[identities]).sum(axis=1)
    nearest = np.where(own, -1, cosines).max(axis=1)
    bound = np.maximum(0.5, np.sqrt((1 + nearest) / 2)) if safe else np.full(4, 0.5)
    assert (found >= bound - 1e-6).all() and (found < 1).all()
    assert len(np.unique(contexts, axis=0)) == 4


def test_guidance_reaches_the_engine(tiny_build, tiny_pack, tmp_path, given):
    generator = save_generator_with_empty_context(tmp_path / "generator", tiny_pack)
    build = changed(
        tiny_build,
        samples__generator=str(generator),
        samples__cfg=1.5,
        samples__weight="piecewise",
        samples__curve="0:1 1:0",
        samples__interval_low=0.1,
        samples__interval_high=0.9,
    )
    specs, (engine, *_) = sampled(build, tmp_path / "store", given)
    settings = engine.settings
    assert (settings.cfg, settings.interval, engine.curve) == (1.5, (0.1, 0.9), ((0, 1), (1, 0)))
    assert read_arrays(specs["samples"], Unit(0, 0))["image"].std() > 10


def test_what_a_unit_took_tells_warm_up_from_sampling(tiny_build, tmp_path):
    specs = make(tiny_build, tmp_path, stages=("contexts", "negatives"))
    prepare(specs["samples"])
    _cached_engine.cache_clear()
    first, second = (run_unit(specs["samples"], Unit(block, 0), EXECUTION).seconds for block in (0, 1))
    assert set(first) == {"read", "warm_up", "sample", "write"}
    # the engine is made once
    assert 0 <= second["warm_up"] < first["warm_up"] and second["sample"] > 0


def test_threads_that_start_together_share_an_engine(tiny_build, tmp_path, given):
    specs = make(tiny_build, tmp_path, stages=("contexts", "negatives"))
    prepare(specs["samples"])
    _cached_engine.cache_clear()
    with ThreadPoolExecutor(2) as threads:
        units = [Unit(0, 0), Unit(1, 0)]
        list(threads.map(lambda unit: run_unit(specs["samples"], unit, EXECUTION), units))
    assert len(given) == 2 and given[0][0] is given[1][0]


class GPU:
    """Stands in for the turn on a GPU: notes what is done while somebody has it."""

    def __init__(self, log):
        self.log = log

    def __enter__(self):
        self.log.append("turn")

    def __exit__(self, *error):
        self.log.append("over")


def test_a_unit_is_read_and_written_out_of_turn(tiny_build, tmp_path, monkeypatch):
    specs = make(tiny_build, tmp_path, stages=("contexts", "negatives"))
    prepare(specs["samples"])
    log = []

    def noting(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (log.append(name), function(*a, **k))[1])

    noting(samples, "contexts_of")
    noting(samples, "commit")
    noting(SamplingEngine, "sample")
    engine = samples._engine(specs["samples"], "cpu", EXECUTION)
    monkeypatch.setattr(engine, "turn", GPU(log))
    run_unit(specs["samples"], Unit(0, 0), EXECUTION)
    assert log == ["contexts_of", "contexts_of", "turn", "sample", "turn", "over", "over", "commit"]


def test_a_precision_that_the_device_lacks_is_refused_before_work_starts():
    check_available(ExecutionConfig(device="cpu"), "fp32", "bf16")
    with pytest.raises(ConfigError, match="precision is tf32, which a CPU does not have"):
        check_available(ExecutionConfig(device="cpu"), "fp32", "tf32")


def test_classifier_free_guidance_needs_a_learned_empty_context(tiny_build, tmp_path):
    with pytest.raises(ConfigError, match=r"samples.cfg is 2, but the generator .* has not learned an empty"):
        plan_build(changed(tiny_build, samples__cfg=2.0), str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples__weight": "piecewise"}, "the weight piecewise needs `curve`"),
        ({"samples__curve": "0:1 1:0"}, "the weight constant needs no `curve`"),
        ({"samples__safe": True}, "safe bounds the turn of a transform"),
        ({"negatives__rule": "null", "negatives__count": 2}, "names nobody, so that count must be 1, not 2"),
        ({"samples__interval_low": 0.7, "samples__interval_high": 0.2}, "interval_low is 0.7"),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(tiny_build, changes, message):
    with pytest.raises(ValueError, match=message):
        changed(tiny_build, **changes)


def test_a_curve_that_makes_no_sense_is_refused_before_work_starts(tiny_build, tmp_path):
    build = changed(tiny_build, samples__weight="piecewise", samples__curve="0:1 0.5:1")
    with pytest.raises(ConfigError, match=r"'0:1 0\.5:1': give points t/T:factor"):
        planned(build, tmp_path)
