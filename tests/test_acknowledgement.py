"""The terms of the weights: shown and accepted before anything is made, once, and written into the record."""

import io
import shutil
from contextlib import nullcontext
from inspect import signature

import pytest

from flows import build, cli, command, export, results, resume
from flows.acknowledgement import Acknowledgement, acknowledge_in_terminal, acknowledged
from flows.presets import demo_builds
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.export.manifest import MANIFEST
from negfacediff_core.store.runs import read_run, write_run

PLAIN = ExecutionConfig(workers=1, device="cpu")
ACCEPTING = PLAIN.model_copy(update={"accept_licences": True})
NC = "CC BY-NC 4.0"


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def licences(monkeypatch):
    """What lies beside the weights, by the name of their folder; elsewhere it is NC."""
    found = {}
    monkeypatch.setattr(results, "licence_of", lambda path: found.get(path.name, found.get("", NC)))
    return found


@pytest.fixture
def specs(tiny_build, tmp_path, licences):
    return build.stages_of(tiny_build, str(tmp_path / "store"))


@pytest.fixture
def store(tiny_store, tmp_path):
    return str(shutil.copytree(tiny_store, tmp_path / "copy"))


@pytest.mark.usefixtures("licences")
def test_a_flow_makes_nothing_before_the_terms_are_accepted(tiny_build, tmp_path):
    store = tmp_path / "store"
    with pytest.raises(ConfigError, match=r"CC BY-NC 4\.0\. Not for commercial use.*set accept_licences"):
        build.build_dataset.fn(tiny_build, PLAIN, str(store))
    assert not list(store.glob("*"))


@pytest.fixture
def make(monkeypatch, licences):
    """Make a build as the flow does, without Prefect around it; all units are there already."""
    monkeypatch.setattr(build, "turn", lambda store: nullcontext())
    monkeypatch.setattr(build, "publish", lambda *what: None)

    def made(config, execution, store):
        build.make_dataset(lambda: config, execution, store)
        return read_run(store, config.name)

    return made


def test_what_was_accepted_stands_in_the_record_and_is_not_asked_again(tiny_build, store, make, licences):
    first = make(tiny_build, ACCEPTING, store)
    assert Acknowledgement(**first["acknowledged"]).covers(first["licences"])
    # as a run that is resumed, grown by a schedule, or evaluated anew
    assert make(tiny_build, PLAIN, store)["acknowledged"] == first["acknowledged"]
    other = tiny_build.model_copy(update={"name": "tiny.evaluated"})
    assert make(other, PLAIN, store)["acknowledged"] == first["acknowledged"]
    # weights whose terms have changed since are others
    licences["generator"] = "CC BY-NC-SA 4.0"
    with pytest.raises(ConfigError, match=r"CC BY-NC-SA 4\.0"):
        make(tiny_build, PLAIN, store)
    licences["generator"] = "MIT"
    assert make(tiny_build, PLAIN, store)["acknowledged"] == first["acknowledged"]
    licences[""] = "MIT"
    assert make(tiny_build, PLAIN, store)["acknowledged"] is None


@pytest.mark.parametrize(
    "damaged", [None, {}, "yes", {"licences": [{}], "at": "2026"}, {"licences": 3, "at": ""}]
)
def test_a_record_without_an_acknowledgement_is_none(specs, store, damaged):
    write_run(store, "tiny", {**read_run(store, "tiny"), "acknowledged": damaged})
    with pytest.raises(ConfigError, match="Nobody has accepted"):
        acknowledged(store, "tiny", specs, PLAIN)
    assert acknowledged(store, "tiny", specs, ACCEPTING).licences == results.licences_of(specs)


def test_on_a_terminal_the_terms_are_shown_and_asked_for(specs, store, monkeypatch, capsys):
    builds = [("one", specs), ("two", specs)]
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    with pytest.raises(ConfigError, match="not accepted; nothing was made"):
        acknowledge_in_terminal(builds, store, PLAIN)
    said = " ".join(capsys.readouterr().out.split())
    assert "samples: generator" in said and said.count("Not for commercial use.") == 1
    assert "\u2026" not in said
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert acknowledge_in_terminal(builds, store, PLAIN) == ACCEPTING
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match="--accept-licences"):
        acknowledge_in_terminal(builds, store, PLAIN)
    assert acknowledge_in_terminal(builds, store, ACCEPTING) == ACCEPTING
    accepted = acknowledged(store, "one", specs, ACCEPTING).model_dump()
    write_run(store, "one", {"stages": {}, "acknowledged": accepted})
    assert acknowledge_in_terminal(builds, store, PLAIN) == PLAIN
    assert "have been accepted" in capsys.readouterr().out


def test_the_demo_asks_nobody(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert command.check(demo_builds(), str(tmp_path / "store"), PLAIN) == PLAIN
    assert capsys.readouterr().out == "Licence: Apache-2.0.\n"


def test_an_export_says_whether_the_terms_were_accepted(tiny_build, store, make, tmp_path):
    record = {**read_run(store, "tiny"), "config": tiny_build.model_dump(mode="json")}
    write_run(store, "tiny", record)

    def exported(run, name):
        out = tmp_path / name
        export.export_dataset.fn(run, str(out), execution=PLAIN, store=store)
        return out

    assert "Not acknowledged" in (exported("tiny", "before") / "README.md").read_text()
    at = make(tiny_build, ACCEPTING, store)["acknowledged"]["at"]
    after = exported("tiny", "after")
    assert f"accepted these terms on {at[:10]}" in (after / "LICENSE.md").read_text()
    assert at in (after / MANIFEST).read_text()
    kept = {"run": "tiny", "settings": {"gallery": "/data/people.npz", "policy": "drop", "fmr": 0.001}}
    write_run(store, "tiny.kept", {"stages": record["stages"], "gate": kept})
    assert f"accepted these terms on {at[:10]}" in (exported("tiny.kept", "kept") / "README.md").read_text()


def test_commands_that_make_nothing_take_no_acceptance():
    making = [cli.build, cli.demo, cli.sweep, cli.grow, cli.evaluate, cli.export, resume.resume]
    assert all("accept_licences" in signature(one).parameters for one in making)
    assert not any("accept_licences" in signature(one).parameters for one in (cli.leakage, cli.plan))
