"""Trainings in processes of their own: killed in mid-epoch, and several at one."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from crop_folders import EXECUTION, nobody, save_crops, tiny_job
from test_fr_training import Interrupted, equal, interrupt_at

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.recognition.dynamics import read_final
from negfacediff_core.recognition.fit import fit
from negfacediff_core.tensor_files import read_tensors

pytestmark = pytest.mark.slow

EPOCHS = 6
TRAIN = f"""
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from crop_folders import EXECUTION, tiny_job
from negfacediff_core.recognition.fit import fit

def progress(done, total):
    time.sleep(float(sys.argv[3]))
    print(done, flush=True)

execution = EXECUTION.model_copy(update={{"checkpoint_seconds": 0.0}})
fit(tiny_job(Path(sys.argv[1]), Path(sys.argv[2]), execution, epochs={EPOCHS}, head="adaface"), progress)
"""


STOPPED = """
import signal, sys
from pathlib import Path
import torch
from crop_folders import EXECUTION, tiny_job
from negfacediff_core.recognition.fit import fit
from negfacediff_core.stopping import ended_when
from tasks.signals import kept_signals

def progress(done, total):
    print(done, flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    execution = EXECUTION.model_copy(update={"processes": int(sys.argv[3]), "checkpoint_seconds": 1e4})
    job = tiny_job(Path(sys.argv[1]), Path(sys.argv[2]), execution, epochs=400)
    with kept_signals() as asked_to_end, ended_when(asked_to_end):
        fit(job, progress)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve identities, four crops of each."""
    return save_crops(tmp_path_factory.mktemp("processes") / "set")


def start(source: Path, folder: Path, pause: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(source), str(folder), str(pause)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_training_that_is_killed_equals_one_that_is_not(source, tmp_path):
    with start(source, tmp_path / "whole", 0.0) as whole:
        whole.communicate()
    assert whole.returncode == 0
    random = np.random.default_rng(int(time.time()))
    kills = 0
    while kills < 6:
        with start(source, tmp_path / "parts", 0.02) as process:
            # a few steps of four an epoch further, then at any moment
            for _ in range(random.integers(2, 7)):
                if not process.stdout.readline():
                    break
            time.sleep(random.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert kills >= 3
    with start(source, tmp_path / "parts", 0.0) as rest:
        rest.communicate()
    assert rest.returncode == 0
    for name in ("state.pt", "best.pt"):
        whole_state, parts_state = (read_tensors(tmp_path / each / name) for each in ("whole", "parts"))
        assert equal(whole_state, parts_state), name
    for epoch in range(1, EPOCHS + 1):
        saved = [
            np.load(tmp_path / each / "dynamics" / f"epoch-{epoch:04d}.npz") for each in ("whole", "parts")
        ]
        assert all((saved[0][key] == saved[1][key]).all() for key in ("log_probability", "outcome"))
    rows = [list(csv.DictReader((tmp_path / each / "curves.csv").open())) for each in ("whole", "parts")]
    timed = ("seconds", "images_per_second", "waited")
    assert [{key: row[key] for key in row if key not in timed} for row in rows[0]] == [
        {key: row[key] for key in row if key not in timed} for row in rows[1]
    ]


def test_two_processes_train_what_one_does_in_two_parts(source, tmp_path):
    two = EXECUTION.model_copy(update={"processes": 2, "checkpoint_seconds": 0.0})
    told = []
    shared = fit(tiny_job(source, tmp_path / "two", two, epochs=2), lambda *now: told.append(now))
    alone = fit(tiny_job(source, tmp_path / "one", epochs=2, accumulate=2), nobody)
    assert told[0] == (0, 64) and told[-1] == (64, 64)
    assert shared["epochs"] == alone["epochs"] == 2
    weights = [read_tensors(tmp_path / each / "state.pt")["module"] for each in ("two", "one")]
    for name, value in weights[0].items():
        # running statistics are those of the parts that the first process has seen
        if "running" not in name and "batches" not in name:
            torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)
    for epoch in (1, 2):
        saved = [np.load(tmp_path / each / "dynamics" / f"epoch-{epoch:04d}.npz") for each in ("two", "one")]
        np.testing.assert_allclose(saved[0]["log_probability"], saved[1]["log_probability"], atol=1e-2)
    # in the end both look with the running statistics that are saved, each at a part of the images
    shared = read_final(tmp_path / "two")
    (tmp_path / "two" / "dynamics" / "final.npz").unlink()
    fit(tiny_job(source, tmp_path / "two", epochs=2), nobody)
    np.testing.assert_allclose(read_final(tmp_path / "two").probability, shared.probability, rtol=1e-4)


# A terminal sends Ctrl-C to all processes, SLURM and systemd send SIGTERM to them, and who cancels to one.
@pytest.mark.parametrize(
    ("processes", "number", "send"),
    [
        (1, signal.SIGINT, os.killpg),
        (1, signal.SIGTERM, os.kill),
        (2, signal.SIGINT, os.killpg),
        (2, signal.SIGTERM, os.kill),
        (2, signal.SIGTERM, os.killpg),
    ],
)
def test_a_training_that_is_asked_to_end_saves_its_state_first(source, tmp_path, processes, number, send):
    script = tmp_path / "train.py"
    script.write_text(STOPPED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(source), str(tmp_path / "out"), str(processes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    for _ in range(3):
        assert process.stdout.readline()
    send(process.pid, number)
    told, said = process.communicate(timeout=120)
    assert process.returncode == -number, said
    position = read_tensors(tmp_path / "out" / "state.pt")["position"]
    done = 8 * (4 * position["epoch"] + position["step"])
    assert done >= max(map(int, told.split()), default=16)
    more = tiny_job(source, tmp_path / "out", epochs=400)
    with pytest.raises(Interrupted):
        fit(more, interrupt_at(done + 8))


def test_one_process_goes_on_with_what_two_began(source, tmp_path):
    job = tiny_job(source, tmp_path, EXECUTION.model_copy(update={"checkpoint_seconds": 0.0}))
    with pytest.raises(Interrupted):
        fit(job, interrupt_at(40))
    two = tiny_job(source, tmp_path, EXECUTION.model_copy(update={"processes": 2}))
    told = []
    assert fit(two, lambda *now: told.append(now))["epochs"] == 2
    assert told[0] == (40, 64)


def test_what_one_of_several_processes_raises_is_told_as_it_is(source, tmp_path):
    two = EXECUTION.model_copy(update={"processes": 2})
    with pytest.raises(NegFaceDiffError, match=r"^The training diverged in epoch 1: .* another folder\.$"):
        fit(tiny_job(source, tmp_path, two, learning_rate=1e30), nobody)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others(source, tmp_path, rank):
    two = EXECUTION.model_copy(update={"processes": 2})

    def kill(done, total):
        if done == 16:
            children = sorted(multiprocessing.active_children(), key=lambda each: each.pid)
            os.kill(children[rank].pid, signal.SIGKILL)

    with pytest.raises(NegFaceDiffError, match=r"A process of the training failed: .* goes on"):
        fit(tiny_job(source, tmp_path, two, epochs=400), kill)
    assert not multiprocessing.active_children()
