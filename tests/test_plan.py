"""`negfacediff plan` and the approval of long builds: what they say, what they leave undone."""

import io
import json
import threading
import time
from dataclasses import replace

import pytest
import yaml
from distributed import LocalCluster
from prefect.client.orchestration import get_client
from prefect.flow_runs import resume_flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console
from stage_builds import changed, make

from flows import approval, calibrations, cli, planning
from flows.build import build_dataset
from flows.plan import plan_json, print_plan
from flows.planning import places_of, plan_of, timed_plan_of
from flows.presets import load_build, preset_texts
from flows.rounds import CHUNKS, chunk_size, task_runs
from negfacediff_core.config import ExecutionConfig, Speed
from negfacediff_core.cost import Calibration, NetworkRates, Rate
from negfacediff_core.errors import BuildError, ConfigError, WeightsError, WorkerError
from negfacediff_core.operations import unet_gflop
from negfacediff_core.stages import calibration
from negfacediff_core.stages.build import STAGES
from negfacediff_core.stages.costs import networks_of
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.status import status

ONE = ExecutionConfig(workers=1, device="cpu")
# A device so slow that the tiny build would take weeks.
SLOW = Calibration("a snail", "made up", False, (NetworkRates("fp32", 1.0, Rate(1e-6), Rate(1e-6)),))


def said(plan) -> str:
    """What is printed of a plan."""
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=120))
    return out.getvalue()


def run(*arguments: str) -> int:
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


@pytest.fixture
def tiny_preset(tiny_build, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_build.model_dump()))
    return str(file)


def test_a_plan_counts_everything_and_makes_nothing(tiny_build, tmp_path):
    plan = plan_of(tiny_build, str(tmp_path / "store"), ONE)
    assert not (tmp_path / "store").exists()
    assert (plan.identities, plan.images) == (5, 15)
    assert {name: stage.units for name, stage in plan.stages.items()} == {
        "contexts": 1,
        "negatives": 1,
        "samples": 6,
        "aligned": 6,
        "embeddings": 6,
        "scores": 0,
        "evaluation": 1,
    }
    # two DDIM steps with a negative for 24 images: the last blocks are filled
    assert (plan.passes, plan.evaluations) == ({2: 2}, 4 * 24)
    assert plan.time is None and plan.assumed == ()
    assert "96 evaluations; 4 an image: 2 passes x 2 contexts" in said(plan)


def test_what_the_store_holds_already_is_left_out(tiny_build, tmp_path):
    before = plan_of(tiny_build, str(tmp_path), ONE, SLOW)
    make(tiny_build, tmp_path, stages=("contexts", "negatives", "samples"))
    plan = plan_of(tiny_build, str(tmp_path), ONE, SLOW)
    assert {name: stage.done for name, stage in plan.stages.items()} == {
        "contexts": 1,
        "negatives": 1,
        "samples": 6,
        "aligned": 0,
        "embeddings": 0,
        "scores": 0,
        "evaluation": 0,
    }
    assert (plan.evaluations, plan.evaluations_left) == (96, 0)
    assert "of which 96 are done" in said(plan)
    assert "samples" in before.time.stages and "samples" not in plan.time.stages
    # contexts and negatives were a task run each; both groups that are left take theirs
    assert before.task_runs - plan.task_runs == 2


# Presets of more than the paper's 10,050 identities: (images, rows of samples) of them.
LARGE = {
    "sdfr-1m": (1_005_000, 1_005_200),
    "datacv-20k": (1_005_000, 1_005_200),
    "datacv-100k": (5_025_000, 5_025_200),
}


@pytest.mark.parametrize("name", sorted(set(preset_texts()) - {"demo", *LARGE}))
def test_presets_are_planned_before_their_weights_are_there(name, tmp_path):
    plan = plan_of(load_build(name), str(tmp_path / "store"), ONE)
    assert not (tmp_path / "store").exists()
    assert len(plan.assumed) == 3 and "full-size network of IDiff-Face is assumed" in plan.assumed[0]
    assert plan.gflop == pytest.approx(13.5, rel=0.01)
    # 10,050 identities, whose last block of 8 is filled up
    assert (plan.images, plan.stages["samples"].rows) == (502_500, 502_800)
    assert plan.task_runs < 500
    assert 30e9 < sum(stage.bytes for stage in plan.stages.values()) < 60e9
    for sentence in plan.assumed:
        assert sentence in said(plan)


@pytest.mark.parametrize("name", LARGE)
def test_large_presets_are_planned_as_well(name, tmp_path):
    plan = plan_of(load_build(name), str(tmp_path / "store"), ONE)
    assert (plan.images, plan.stages["samples"].rows) == LARGE[name]
    assert plan.evaluations == 400 * LARGE[name][1]


def test_the_published_presets_take_the_published_evaluations(tmp_path):
    each = {
        name: plan_of(load_build(name), str(tmp_path), ONE).evaluations / 502_800
        for name in ("idiff-face", "negfacediff", "negfacediff-ddpm", "fast")
    }
    assert each == {"idiff-face": 200, "negfacediff": 400, "negfacediff-ddpm": 2000, "fast": 40}


def test_weights_that_are_there_and_damaged_are_refused(tiny_build, tiny_pack, tmp_path):
    folder = tmp_path / "generator"
    folder.mkdir()
    with pytest.raises(WeightsError, match=r"samples\.generator.*config\.yaml is missing"):
        plan_of(changed(tiny_build, samples__generator=str(folder)), str(tmp_path / "store"), ONE)


def test_a_timed_plan_gives_times_with_their_uncertainty(tiny_build, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "BUDGET", 0.2)
    plan = timed_plan_of(tiny_build, str(tmp_path / "store"), ONE)
    assert not (tmp_path / "store").exists()
    wall = plan.time.wall
    assert 0 < wall.low <= wall.seconds < wall.high
    assert set(plan.time.stages) == {"negatives", "samples", "aligned", "embeddings", "evaluation"}
    assert plan.time.missing == () and plan.calibration.warm_up > 0
    text = said(plan)
    assert "time        about" in text and "loading and warming up" in text
    assert "the start of Prefect" in text


@pytest.mark.parametrize("name", calibrations.calibration_names())
def test_every_stored_calibration_says_how_it_is_known(name):
    calibration = calibrations.load_calibration(name)
    assert len(calibration.how) > 20
    for generator in calibration.generators:
        assert 0 < generator.unet.value < 1e7 and 0 < generator.decoder.value < 1e7
    if calibration.floor:
        assert "nothing was measured" in calibration.how and not calibration.rates
    else:
        assert {"detect", "embed", "write", "mine", "score"} <= set(calibration.rates)


def test_a_gpu_that_was_not_measured_gives_a_floor_and_is_named_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("plan", "negfacediff", "--device", "h100", "--set", "samples.precision=bf16") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "at least" in text and "a floor" in text
    assert "without the time of negatives, aligned, embeddings, evaluation" in text
    assert not list(tmp_path.iterdir())


def test_a_precision_that_was_not_timed_and_an_unknown_device_are_refused(tiny_preset, capsys):
    assert run("plan", tiny_preset, "--device", "h1000") == 2
    assert "no calibration of a device 'h1000'; there are a100" in capsys.readouterr().err


def test_json_holds_what_the_table_shows(tiny_preset, tmp_path, capsys):
    assert run("plan", tiny_preset, "--store", str(tmp_path / "store"), "--no-calibrate", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["evaluations"] == 96 and content["passes"] == {"2": 2}
    assert content["stages"]["samples"]["units"] == 6
    assert content["bytes"] == sum(stage["bytes"] for stage in content["stages"].values())
    assert content["time"] is None


def test_json_of_a_timed_plan_has_all_spans(tiny_build, tmp_path):
    content = json.loads(json.dumps(plan_json(plan_of(tiny_build, str(tmp_path), ONE, SLOW))))
    assert content["time"]["wall"]["low"] <= content["time"]["wall"]["seconds"]
    assert content["calibration"]["device"] == "a snail"


def test_places_are_those_of_the_executors(monkeypatch):
    assert places_of(ExecutionConfig(workers=3, device="cpu")) == (0, 3)
    monkeypatch.setattr("tasks.machine.usable_cores", lambda: 8)
    assert places_of(ExecutionConfig(device="cpu", threads_per_worker=2)) == (0, 4)
    assert places_of(ExecutionConfig(executor="tcp://host:1", workers=20, device="cpu")) == (0, 20)
    monkeypatch.setattr(planning, "uses_gpu", lambda device: True)
    assert places_of(ExecutionConfig()) == (1, 8)
    assert places_of(ExecutionConfig(executor="cuda", workers=4)) == (4, 8)

    onto_gpus = replace(SLOW, gpu=True)
    for executor in ("slurm", "tcp://host:1"):
        assert places_of(ExecutionConfig(executor=executor, workers=8), onto_gpus) == (8, 8)
        assert places_of(ExecutionConfig(executor=executor, workers=8), SLOW) == (0, 8)


def test_a_device_that_is_not_here_is_refused_before_it_is_timed(tiny_preset, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert run("plan", tiny_preset, "--device", "cuda") == 2
    said = capsys.readouterr().err
    assert "The device cuda needs an NVIDIA GPU" in said and len(said.strip().splitlines()) == 1


def test_workers_that_are_not_there_yet_are_not_timed(tiny_preset, capsys):
    ask = ("plan", tiny_preset, "--executor", "slurm", "--workers", "8")
    assert run(*ask, "--device", "cuda") == 2
    assert "name a stored calibration of such a device by --device (a100, h100" in capsys.readouterr().err
    assert run(*ask, "--device", "h100") == 0
    assert "at least 0:00 on 8 x NVIDIA H100" in " ".join(capsys.readouterr().out.split())


def test_a_build_may_name_any_stored_calibration():
    assert [Speed.timed, *calibrations.calibration_names()] == list(Speed)


def timed_there(build, networks, specs, execution, budget):
    """Tell who was asked in place of being timed."""
    from distributed import get_worker

    return replace(SLOW, device=str(get_worker().name), gpu=execution.device != "cpu")


@pytest.mark.parametrize(("device", "places"), [("auto", (1, 1)), ("cpu", (0, 1))])
def test_the_workers_of_a_scheduler_are_timed_and_counted(tiny_build, tmp_path, monkeypatch, device, places):
    monkeypatch.setattr(planning, "calibrate", timed_there)
    options = {"threads_per_worker": 3, "resources": {"GPU": 2}, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=1, protocol="tcp://", processes=False, **options) as cluster:
        execution = ExecutionConfig(executor=cluster.scheduler_address, device=device)
        plan = timed_plan_of(tiny_build, str(tmp_path), execution)
        assert plan.calibration.device == "0" and (plan.devices, plan.workers) == places
        there = execution.model_copy(update={"device": "cuda:7"})
        with pytest.raises(WorkerError, match="The Dask worker 0 has no device cuda:7"):
            timed_plan_of(tiny_build, str(tmp_path), there)


class Clockwork:
    """A sampler that takes a second for a pass, of however many images, and `each` for an image of it."""

    contexts = 2

    def __init__(self, each):
        self.each, self.counts = each, []

    def batch(self, count):
        return min(count, 32)

    def sample(self, steps, count):
        self.counts.append(count)
        return steps * (1 + self.each * count) + 0.1 * count, None

    def both(self, count):
        return self.sample(1, count)[0], self.sample(4, count)[0]


def test_images_are_timed_in_batches_of_the_build_however_slow_they_are(tiny_build):
    networks = networks_of(tiny_build)

    def timed(each, budget):
        sampler = Clockwork(each)
        rates, _, how = calibration._time_sampling(networks, sampler, 400, "fp32", budget)
        gflop = unet_gflop(networks.unet, networks.latent_shape, 2)
        return sampler, rates.unet.value / gflop, rates.unet.spread, how

    quick, rate, spread, how = timed(0.01, 100.0)
    assert max(quick.counts) == 32 and rate == pytest.approx(32 / 1.32) and "32 images at a time" in how
    slow, rate, spread, how = timed(1.0, 20.0)
    assert sorted(set(slow.counts)) == [1, 19] and "1 images at a time" in how and "of 1 step with 19" in how
    assert rate == pytest.approx(19 / 20) and 0.1 < spread < 0.3, (
        "unlike half an image a second, of one alone"
    )


def test_chunks_keep_a_build_under_500_task_runs():
    units = [Unit(block, 0) for block in range(100_000)]
    pending = {"contexts": units, "negatives": units, "scores": [], "evaluation": units[:1]}
    pending |= dict.fromkeys(("samples", "aligned", "embeddings"), units)
    assert task_runs(pending, workers=2) == 3 * CHUNKS + 1
    assert chunk_size(10, workers=4) == 16
    assert task_runs(dict.fromkeys(pending, ()), workers=2) == 0


# -- approval -----------------------------------------------------------------------------------------------


@pytest.fixture
def snail(monkeypatch):
    """The device at hand is very slow, and asked at once."""
    monkeypatch.setattr(planning, "calibrate", lambda *arguments, **options: SLOW)
    monkeypatch.setattr(approval, "LOOK", 0.2)


ASKED = ExecutionConfig(workers=1, device="cpu", approve_above_hours=1.0)


def test_on_a_terminal_a_long_build_is_asked_for(tiny_build, tmp_path, snail, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    with pytest.raises(ConfigError, match="tiny was not approved; nothing was made"):
        approval.approve_in_terminal(tiny_build, str(tmp_path / "store"), ASKED)
    assert "tiny in" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    approval.approve_in_terminal(tiny_build, str(tmp_path / "store"), ASKED)


def test_a_build_within_the_limit_is_not_asked_for(tiny_build, tmp_path, snail, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal(""))
    patient = ASKED.model_copy(update={"approve_above_hours": 1e6})
    approval.approve_in_terminal(tiny_build, str(tmp_path / "store"), patient)


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


def test_with_nobody_to_ask_the_command_refuses_and_says_how_to_approve(
    tiny_preset, tmp_path, snail, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    store = tmp_path / "out" / "store"
    arguments = ["build", tiny_preset, "--store", str(store), "--device", "cpu", "--approve-above-hours", "1"]
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert "more than the 1 h that need no approval" in said and "--yes" in said
    assert len(said.strip().splitlines()) == 1
    assert not list(store.iterdir()), "a place that was tried, and nothing in it"


def answered(build, store, approved: bool):
    """Run a build that pauses, answer it, and return what it raised or returned."""
    outcome = []

    def work():
        try:
            outcome.append(build_dataset(build, ASKED, store))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with get_client(sync_client=True) as client:
        until = time.monotonic() + 60
        paused = []
        while not paused and time.monotonic() < until and thread.is_alive():
            runs = client.read_flow_runs()
            paused = [one for one in runs if one.state is not None and one.state.is_paused()]
            time.sleep(0.1)
    assert paused, outcome
    assert not any(stage.done for stage in status(store)), "nothing is made before the answer"
    resume_flow_run(paused[0].id, run_input={"approved": approved})
    thread.join(120)
    return outcome[0]


def test_in_prefect_a_long_build_pauses_until_it_is_approved(tiny_build, tmp_path, snail, prefect_server):
    result = answered(tiny_build, str(tmp_path), approved=True)
    assert result["name"] == "tiny"
    assert [stage.pending for stage in status(str(tmp_path))] == [0] * len(STAGES)


def test_in_prefect_a_build_that_is_not_approved_makes_nothing(tiny_build, tmp_path, snail, prefect_server):
    outcome = answered(tiny_build, str(tmp_path), approved=False)
    assert isinstance(outcome, BuildError) and "tiny was not approved; nothing was made" in str(outcome)
    assert not any(stage.done for stage in status(str(tmp_path)))


def test_a_build_on_workers_that_are_not_there_yet_is_asked_for(tiny_build, tmp_path, monkeypatch):
    elsewhere = ASKED.model_copy(update={"executor": "slurm", "workers": 8, "device": "cuda"})
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    with pytest.raises(ConfigError, match="tiny was not approved"):
        approval.approve_in_terminal(tiny_build, str(tmp_path), elsewhere)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(
        ConfigError, match=r"How long tiny would take on workers of slurm is not known \(the set"
    ):
        approval.approve_in_terminal(tiny_build, str(tmp_path), elsewhere)
    named = elsewhere.model_copy(update={"calibration": "h100"})
    approval.approve_in_terminal(tiny_build, str(tmp_path), named)  # seconds at the least


def test_without_a_server_to_ask_in_a_flow_refuses(tiny_build, tmp_path, snail):
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(ConfigError, match="no Prefect server"):
        approval.approve_in_prefect(tiny_build, str(tmp_path), ASKED)


def test_the_plan_foretells_the_task_runs_of_a_build(tiny_build, tmp_path, prefect_server):
    foretold = plan_of(tiny_build, str(tmp_path), ONE).task_runs
    with get_client(sync_client=True) as client:
        before = len(client.read_task_runs())
        build_dataset(tiny_build, ONE, str(tmp_path))
        assert len(client.read_task_runs()) - before == foretold
