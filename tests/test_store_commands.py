"""verify, resume, retry-failed, gc and logs as a user meets them, on a small store that was really built."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from stage_builds import EXECUTION, changed
from stored_files import results

from flows import cli, resume
from flows.results import record_run
from flows.words import command_text, count_text, names_text, size_text
from negfacediff_core.diffusion.engine import SamplingEngine
from negfacediff_core.errors import BuildError
from negfacediff_core.stages.build import plan_build, run_unit
from negfacediff_core.store.records import pending
from negfacediff_core.store.shards import prepare
from negfacediff_core.store.status import unfinished


def build(store, config, *rest, seconds=1.0):
    """Build as the flow does, without Prefect; return how many units were made."""
    specs = {spec.name: spec for spec in plan_build(config, str(store))}
    for spec in specs.values():
        prepare(spec)
    record_run(config, specs, str(store))
    made = 0
    for spec in specs.values():
        for unit in pending(spec):
            run_unit(spec, unit, EXECUTION)
            made += 1
    record_run(config, specs, str(store), seconds)
    return made


@pytest.fixture(scope="module")
def built(tiny_build, tmp_path_factory):
    store = tmp_path_factory.mktemp("built") / "store"
    build(store, tiny_build)
    return store


@pytest.fixture
def store(built, tmp_path, monkeypatch):
    """A copy of the store; the commands build in it without Prefect, and say in `made` how many units."""
    monkeypatch.setattr(resume, "build_in", lambda *what: made.append(build(*what)))
    made.clear()
    return Path(shutil.copytree(built, tmp_path / "my store"))


made: list[int] = []


def run(capsys, *arguments):
    """Run the command line in this process; return exit code and all that it says, in one line."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    return stop.value.code, " ".join((shown.out + shown.err).split())


def stage_folder(store, name):
    return next((store / name).iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_a_whole_store_verifies(store, capsys):
    code, said = run(capsys, "verify", store)
    assert code == 0
    assert "Checked 21 units" in said and "MB/s)" in said.replace("kB/s", "MB/s") and "No damage was" in said
    code, said = run(capsys, "verify", store, "--sample", "20%", "--seed", "3", "--run", "tiny")
    assert code == 0 and "Checked 4 units" in said
    assert said.count("verify 1/1 MB") == 1, "its end is told once"


@pytest.mark.parametrize("name", ["tinny", "Kept", "../tiny"])
def test_a_run_that_is_not_there_is_no_damage(name, store, capsys):
    for command in (["verify", store, "--run", name], ["resume", store, name], ["retry-failed", store, name]):
        code, said = run(capsys, *command)
        assert code == 2 and f"There is no run {name} in {store}; runs there: tiny." in said
        assert "Damage" not in said and "--repair" not in said


def test_damage_is_listed_repaired_and_made_again_as_it_was(store, built, capsys):
    samples = stage_folder(store, "samples")
    truncate(samples / "rows" / "part-00001-000.parquet")
    code, said = run(capsys, "verify", store)
    assert code == 1
    assert "Damage: 1 file, of 1 committed unit." in said
    assert (
        f"samples/{samples.name} 00001-000 rows/part-00001-000.parquet: it is not what was committed" in said
    )
    assert f"negfacediff verify '{store}' --repair" in said
    assert unfinished(str(store)) == {}

    code, said = run(capsys, "verify", store, "--repair")
    assert code == 1
    assert "Pending again: 1 unit, and 3 units made from them." in said
    assert f"negfacediff resume '{store}' tiny" in said
    assert unfinished(str(store)) == {"tiny": 4}

    code, said = run(capsys, "resume", store)
    assert (code, made) == (0, [4])
    assert results(store) == results(built)
    assert run(capsys, "verify", store)[0] == 0


@pytest.mark.parametrize("stage", ["contexts", "negatives", "aligned"])
def test_a_damaged_stage_json_is_written_again_by_resuming(stage, store, built, capsys):
    (stage_folder(store, stage) / "stage.json").write_text("{")
    code, said = run(capsys, "verify", store, "--repair")
    assert code == 1 and "stage.json: it is damaged" in said
    assert f"negfacediff resume '{store}' tiny" in said
    assert run(capsys, "resume", store)[0] == 0
    assert made == [0], "committed units are kept"
    assert results(store) == results(built)
    assert run(capsys, "verify", store)[0] == 0


@pytest.mark.parametrize("sample", ["0", "150%", "2", "half", "nan"])
def test_an_impossible_sample_is_refused(sample, store, capsys):
    code, said = run(capsys, "verify", store, "--sample", sample)
    assert code == 2 and f"--sample '{sample}' is no share" in said


@pytest.mark.parametrize("command", ["verify", "resume", "retry-failed", "gc"])
def test_other_folders_are_refused(command, tmp_path, capsys):
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    code, said = run(capsys, command, tmp_path)
    assert code == 2 and "There is no store at" in said
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "2024"]


def test_status_shows_whole_names_however_narrow_the_terminal_is(store, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"tiny.kept.{kind}-images-of-people-3f2a91" for kind in ("training", "public", "test")]
    for name in names:
        shutil.copy(store / "runs" / "tiny.json", store / "runs" / f"{name}.json")
    with pytest.raises(SystemExit) as stop:
        cli.main(["status", str(store)])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and max(map(len, lines)) <= 80
    shown = [line for line in lines if names[0] in line]
    assert len(shown) == 7 and all(any(name in line for line in lines) for name in names)


def test_resume_builds_what_the_run_record_says(store, tiny_build, built, capsys):
    code, said = run(capsys, "resume", store)
    assert code == 0 and "is complete" in said and made == []
    shutil.rmtree(stage_folder(store, "evaluation") / "done")
    assert run(capsys, "resume", store, "--device", "cpu")[0] == 0
    assert made == [1] and results(store) == results(built)
    record = json.loads((store / "runs" / "tiny.json").read_text())
    assert record["config"]["negatives"]["pool"] == tiny_build.identities, "what was left open is recorded"

    build(store, changed(tiny_build, name="other", identities=4), seconds=None)
    build(store, changed(tiny_build, name="third", images=2), seconds=None)
    code, said = run(capsys, "resume", store)
    assert code == 2 and f"other lacks 0 units: negfacediff resume '{store}' other; third" in said
    assert run(capsys, "resume", store, "other")[0] == 0
    assert list(unfinished(str(store))) == ["third"]

    code, said = run(capsys, "resume", store, "fourth")
    assert code == 2 and "There is no run fourth" in said and "other, third, tiny" in said
    record.pop("config")
    (store / "runs" / "bare.json").write_text(json.dumps(record))
    code, said = run(capsys, "resume", store, "bare")
    assert code == 2 and f"negfacediff build PRESET --store '{store}' --set name=bare" in said


def test_retry_failed_makes_units_with_failed_rows_again(store, built, tiny_build, capsys, monkeypatch):
    code, said = run(capsys, "retry-failed", store)
    assert code == 0 and "No unit has failed rows." in said and made == []
    shutil.rmtree(store)
    sample = SamplingEngine.sample

    def failing(self, towards, away, weight, identities, replicates, seed):
        images, clipped = sample(self, towards, away, weight, identities, replicates, seed)
        return images, np.where((identities == 2) & (replicates == 1), np.nan, clipped).astype(np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(SamplingEngine, "sample", failing)
        build(store, tiny_build)
    assert results(store) != results(built)
    code, said = run(capsys, "retry-failed", store)
    assert code == 0
    # samples and crops, which knew of it; embeddings and evaluation were made from them
    assert "Pending again: 2 failed rows in 2 units, and 2 units made from them." in said
    assert made == [4]
    assert results(store) == results(built)


def test_retry_failed_finishes_a_run_whose_units_failed(store, built, tiny_build, capsys, monkeypatch):
    shutil.rmtree(store)
    sample = SamplingEngine.sample

    def poisoned(self, towards, away, weight, identities, replicates, seed):
        if 2 in identities:
            raise RuntimeError("a poisoned unit")
        return sample(self, towards, away, weight, identities, replicates, seed)

    with monkeypatch.context() as patch:
        patch.setattr(SamplingEngine, "sample", poisoned)
        with pytest.raises(BuildError, match="a poisoned unit"):
            build(store, tiny_build)
    lacking = unfinished(str(store))["tiny"]
    assert 0 < lacking < 21
    code, said = run(capsys, "retry-failed", store)
    assert code == 0 and f"Missing: {lacking} units." in said and "Pending again" not in said
    assert made == [lacking] and unfinished(str(store)) == {}
    assert results(store) == results(built)

    for name in ("one", "two"):
        build(store, changed(tiny_build, name=name), seconds=None)
    code, said = run(capsys, "retry-failed", store)
    assert code == 2 and f"one lacks 0 units: negfacediff retry-failed '{store}' one; two lacks" in said


def test_what_failed_in_a_kept_run_is_retried_in_the_run_that_it_copies(
    store, tiny_build, capsys, monkeypatch
):
    shutil.rmtree(store)
    sample = SamplingEngine.sample

    def failing(self, *what):
        images, clipped = sample(self, *what)
        return images, np.full_like(clipped, np.nan)

    with monkeypatch.context() as patch:
        patch.setattr(SamplingEngine, "sample", failing)
        build(store, tiny_build)
    record = json.loads((store / "runs" / "tiny.json").read_text())
    record["gate"] = {"run": "tiny", "settings": {"gallery": "people", "policy": "drop"}}
    (store / "runs" / "tiny.kept.json").write_text(json.dumps(record))
    code, said = run(capsys, "retry-failed", store, "tiny.kept")
    assert code == 2 and f"negfacediff retry-failed '{store}' tiny; afterwards: " in said
    assert f"negfacediff resume '{store}' tiny.kept" in said
    code, said = run(capsys, "retry-failed", store)
    assert code == 0 and "Pending again: " in said
    assert f"afterwards: negfacediff resume '{store}' tiny.kept" in said
    assert len(made) == 1


def test_logs_show_the_record_and_the_last_failure_of_a_unit(store, capsys):
    folder = stage_folder(store, "samples")
    code, said = run(capsys, "logs", store, "samples", "00001-000")
    assert code == 0
    assert f"samples/{folder.name} 00001-000 committed 20" in said
    assert "rows 4: 4 ok, 0 not ok" in said and "sample 0." in said and "device cpu" in said
    assert "no failure was logged" in said
    (folder / "logs").mkdir()
    (folder / "logs" / "00001-000.txt").write_text("line 7\nOSError: a lasting trouble\n\tat \x1b[2Jé\x07\n")
    (folder / "done" / "00001-000.json").unlink()
    code, said = run(capsys, "logs", store, f"samples/{folder.name}", "00001-000")
    assert code == 0 and "not committed" in said and "OSError: a lasting trouble" in said
    with pytest.raises(SystemExit):
        cli.main(["logs", str(store), "samples", "00001-000"])
    shown = capsys.readouterr().out
    assert "    line 7\n    OSError: a lasting trouble\n    \tat \\x1b[2Jé\\x07\n" in shown
    code, said = run(capsys, "logs", store, "images", "00001-000")
    assert code == 2 and "no stage images" in said and "aligned, contexts, embeddings, evaluation" in said
    code, said = run(capsys, "logs", store, "samples", "00009-000")
    assert code == 2 and "there are 00000-000, 00000-001, 00001-000" in said


def test_gc_lists_first_and_deletes_when_asked(store, built, tiny_build, capsys):
    code, said = run(capsys, "gc", store)
    assert code == 0 and "There is nothing to remove." in said
    other = changed(tiny_build, name="other", samples__steps=3)
    build(store, other)
    (store / "runs" / "other.json").unlink()
    for path in [*store.rglob("*")]:
        os.utime(path, (time.time() - 7200,) * 2)
    before = results(store)
    code, said = run(capsys, "gc", store)
    assert code == 0 and said.count("no run needs this stage") == 5
    assert f"negfacediff gc '{store}' --delete" in said and "Nothing was removed." in said
    assert results(store) == before
    code, said = run(capsys, "gc", store, "--delete")
    assert code == 0 and "Removed " in said
    assert results(store) == results(built)
    assert run(capsys, "verify", store)[0] == 0


def test_gc_says_what_it_did_not_look_behind(store, tmp_path, capsys):
    (store / "samples").rename(tmp_path / "elsewhere")
    (store / "samples").symlink_to(tmp_path / "elsewhere")
    code, said = run(capsys, "gc", store)
    assert code == 0 and "samples is a symbolic link: what lies behind it was not looked at." in said
    assert "There is nothing to remove." in said


def test_gc_names_what_has_come_into_use(store, capsys, monkeypatch):
    left = store / "runs" / ".tiny.json.0.tmp"
    left.write_text("{")
    os.utime(left, (time.time() - 7200,) * 2)
    monkeypatch.setattr("negfacediff_core.store.gc.remove", lambda store, rubbish: False)
    code, said = run(capsys, "gc", store, "--delete")
    assert code == 0
    assert "Removed 0 bytes. Not removed, as it has come into use meanwhile: runs/.tiny.json.0.tmp." in said


def test_numbers_lists_and_commands_in_words():
    assert [size_text(n) for n in (0, 999, 1000, 999_950, 2_500_000_000, 10**16)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "1.0 MB",
        "2.5 GB",
        "10,000.0 TB",
    ]
    assert (count_text(1, "unit"), count_text(1200, "unit")) == ("1 unit", "1,200 units")
    assert names_text([]) == "none" and names_text(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"
    assert command_text("gc", "a store; rm -r /") == "negfacediff gc 'a store; rm -r /'"


def test_a_store_keeps_its_blocks_when_a_stage_json_is_lost(tiny_build, tmp_path, capsys, monkeypatch):
    """The record names the blocks that the store has, not those that a later build asked for."""
    store = tmp_path / "store"
    build(store, tiny_build)
    build(store, changed(tiny_build, block_identities=3))
    before = results(store)
    (stage_folder(store, "samples") / "stage.json").write_text("{")
    assert run(capsys, "verify", store, "--repair")[0] == 1
    monkeypatch.setattr(resume, "build_in", lambda *what: made.append(build(*what)))
    made.clear()
    assert run(capsys, "resume", store, "tiny")[0] == 0
    assert made == [0] and results(store) == before


def test_what_would_become_another_dataset_is_not_resumed(store, capsys, monkeypatch):
    monkeypatch.setattr("negfacediff_core.stages.samples.VERSION", 99)
    before = results(store)
    for command in ("resume", "retry-failed"):
        code, said = run(capsys, command, store, "tiny")
        assert code == 2 and "would not go on but begin anew from its samples" in said
    assert made == [] and results(store) == before


def test_nothing_is_forgotten_where_the_build_cannot_run(store, capsys):
    records = {path: path.read_bytes() for path in store.rglob("done/*.json")}
    code, said = run(capsys, "retry-failed", store, "tiny", "--device", "cuda")
    assert code == 2 and "needs an NVIDIA GPU" in said
    assert {path: path.read_bytes() for path in store.rglob("done/*.json")} == records
