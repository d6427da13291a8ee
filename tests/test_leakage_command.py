"""The command `leakage`: what it prints and leaves, and that a second time nothing is made."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from context_material import save_pictures
from stored_files import results

from flows.cli import main
from negfacediff_core.store.extents import read_array, read_column
from negfacediff_core.store.gc import find_rubbish
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.repair import forget_units
from negfacediff_core.store.runs import read_run, stages_of_run, write_run
from negfacediff_core.store.status import unfinished

# minutes on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture(scope="module")
def store(tiny_build, tiny_store, tmp_path_factory):
    """A finished run, as the flow records it."""
    store = shutil.copytree(tiny_store, tmp_path_factory.mktemp("command") / "store")
    record = read_run(str(store), "tiny")
    write_run(str(store), "tiny", {**record, "config": tiny_build.model_dump(mode="json"), "seconds": 1.0})
    return store


def leakage(store, *options):
    """Run the command; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["leakage", str(store), "tiny", "--workers", "2", *map(str, options)])
    return stop.value.code


def again(command, store, *options):
    """Run a command that goes on with a run; its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([command, str(store), *options, "--workers", "2"])
    return stop.value.code


def data_of(store):
    """What a store holds but for its pages, which tell what the work took."""
    return {path: content for path, content in results(store).items() if not path.endswith(".html")}


def runs_of_gate(store, kind="*"):
    """The names of the runs that gates made of the run, in order."""
    return sorted(path.stem for path in (store / "runs").glob(f"tiny.{kind}.*.json"))


@pytest.fixture(autouse=True)
def only_the_run(store):
    """What gates of other tests have made is no part of the next."""
    yield
    for path in (store / "runs").glob("tiny.*.*"):
        path.unlink()


def leaky_gallery(store, folder):
    """Embeddings of 150 strangers and of one image of the run; and which images of the run show a face."""
    embedded = stages_of_run(str(store), "tiny")["embeddings"]
    embeddings = read_array(embedded, "embedding", 5, 3)
    valid = read_column(embedded, "status", 5, 3) == "ok"
    own = embeddings[valid][0] / np.linalg.norm(embeddings[valid][0])
    strangers = own + 0.03 * np.random.default_rng(0).standard_normal((150, len(own)))
    file = folder / "gallery.npz"
    names = [f"stranger {number}" for number in range(150)] + ["a training image"]
    np.savez(file, embeddings=np.concatenate([strangers, own[None]]).astype(np.float32), names=names)
    return file, valid


def test_images_that_leak_are_counted_flagged_and_dropped(store, tmp_path, capsys):
    stages = stages_of_run(str(store), "tiny")
    file, valid = leaky_gallery(store, tmp_path)

    assert leakage(store, "--gallery", file, "--policy", "drop", "--fmr", 0.001) == 0
    said = capsys.readouterr()
    assert "make sure that it is none of those that look here" in said.out  # the tiny generator does not tell
    assert f"{valid.sum()} of 15 images compared with 151 faces of 151 people" in said.out
    assert (
        "11,325 impostor pairs; FMR 0.0001 takes 100,000, FMR 1e-05 takes" in said.out
        and "the run tiny.kept.gallery-" in said.out
    )
    place = tuple(np.argwhere(valid)[0])
    assert f"identity {place[0]}, image {place[1]} and a training image: 1.000" in said.out
    (counts,), (kept_run,) = runs_of_gate(store, "leakage"), runs_of_gate(store, "kept")
    flagged = pq.read_table(store / "runs" / f"{counts}.parquet")
    found = list(
        zip(flagged.column("identity").to_pylist(), flagged.column("replicate").to_pylist(), strict=True)
    )
    assert place in found
    status = read_column(stages_of_run(str(store), kept_run)["embeddings"], "status", 5, 3)
    assert [tuple(map(int, one)) for one in np.argwhere(status == "leaked")] == found
    assert (read_column(stages["embeddings"], "status", 5, 3) == "leaked").sum() == 0
    kept = stages_of_run(str(store), kept_run)["evaluation"]
    assert kept_run in (store / kept.path / "report.html").read_text()
    assert unfinished(str(store)) == {}
    assert find_rubbish(str(store)) == []

    records = {path: path.read_bytes() for path in store.glob("*/*/done/*.json")}
    assert leakage(store, "--gallery", file, "--policy", "drop", "--fmr", 0.001) == 0
    assert {path: path.read_bytes() for path in store.glob("*/*/done/*.json")} == records


def test_a_gate_and_what_it_kept_are_gone_on_with_by_their_records(store, tmp_path, capsys):
    file, _ = leaky_gallery(store, tmp_path)
    assert leakage(store, "--gallery", file, "--policy", "drop", "--fmr", 0.001) == 0
    whole = data_of(store)
    counts, kept_run = sorted(runs_of_gate(store), reverse=True)
    record = read_run(str(store), kept_run)
    assert record["gate"]["run"] == "tiny" and record["gate"]["settings"]["gallery"] == str(file)
    kept = stages_of_run(str(store), kept_run)
    compared = read_run(str(store), counts)["stages"]["neighbours"]["fingerprint"]

    forget_units(str(store), {kept["evaluation"].path: {Unit(0, 0)}})
    assert list(unfinished(str(store))) == [kept_run]
    capsys.readouterr()
    assert again("resume", store) == 0
    assert "11,325 impostor pairs" in capsys.readouterr().out
    assert unfinished(str(store)) == {} and data_of(store) == whole

    forget_units(str(store), {f"neighbours/{compared}": {Unit(0, 0)}})
    assert sorted(unfinished(str(store))) == [kept_run, counts]
    assert again("retry-failed", store, counts) == 0
    assert "Missing: " in capsys.readouterr().out
    assert unfinished(str(store)) == {} and data_of(store) == whole

    np.savez(file, embeddings=np.random.default_rng(1).standard_normal((151, 16)).astype(np.float32))
    for name in (counts, kept_run):
        assert again("resume", store, name) == 2
        said = capsys.readouterr().err
        assert f"The run {name} would not go on but begin anew" in said and "negfacediff leakage" in said
    assert data_of(store) == whole


def test_a_gallery_that_failed_is_read_again_with_all_that_was_compared_with_it(store, tmp_path, capsys):
    gallery = save_pictures(tmp_path / "people", range(4))
    (gallery / "broken.png").write_bytes(b"no picture")
    assert leakage(store, "--gallery", gallery) == 0
    whole = data_of(store)
    capsys.readouterr()
    (counts,) = runs_of_gate(store)
    assert again("retry-failed", store, counts) == 0
    made = len(stages_of_run(str(store), "tiny")["aligned"].grid.units()) + 1
    said = capsys.readouterr().out
    assert f"Pending again: 1 failed row in 1 unit, and {made} units made from them." in said
    assert data_of(store) == whole and counts not in unfinished(str(store))


def test_galleries_stand_side_by_side_and_older_records_go_on(store, tmp_path, capsys):
    file, _ = leaky_gallery(store, tmp_path)
    people = save_pictures(tmp_path / "public set", range(4))
    assert leakage(store, "--gallery", file, "--policy", "drop", "--fmr", 0.001) == 0
    first = {name: read_run(str(store), name) for name in runs_of_gate(store)}
    assert leakage(store, "--gallery", people) == 0
    kept_run, counts, other = runs_of_gate(store)
    assert counts.startswith("tiny.leakage.gallery-") and other.startswith("tiny.leakage.public-set-")
    assert {name: read_run(str(store), name) for name in first} == first
    assert find_rubbish(str(store)) == [] and unfinished(str(store)) == {}

    # as versions before named them
    older = {"tiny.leakage": first[counts], "tiny.kept": first[kept_run]}
    for name, record in older.items():
        write_run(str(store), name, record)
    for name in first:
        (store / "runs" / f"{name}.json").unlink()
    kept = stages_of_run(str(store), "tiny.kept")
    forget_units(str(store), {kept["evaluation"].path: {Unit(0, 0)}})
    assert list(unfinished(str(store))) == ["tiny.kept"]
    assert again("resume", store, "tiny.kept") == 0
    assert unfinished(str(store)) == {}
    for name in older:
        (store / "runs" / f"{name}.json").unlink()


def test_a_kept_run_cannot_be_dropped_from_again(store, tmp_path, capsys):
    record = read_run(str(store), "tiny")
    gate = {"run": "tiny", "settings": {"gallery": "people", "policy": "drop"}}
    write_run(str(store), "tiny.kept", {**record, "config": None, "gate": gate})
    file, _ = leaky_gallery(store, tmp_path)
    asked = ["--gallery", str(file), "--policy", "drop", "--fmr", "0.001"]
    assert again("leakage", store, "tiny.kept", *asked) == 2
    assert "was made by negfacediff leakage and not by a build" in capsys.readouterr().err
    (store / "runs" / "tiny.kept.json").unlink()


def test_pictures_are_drawn_when_asked(store, tmp_path, capsys):
    gallery = save_pictures(tmp_path / "people", range(4))
    assert leakage(store, "--gallery", gallery) == 0
    report = store / capsys.readouterr().out.split("report   ")[1].split("\n")[0]
    assert json.loads(report.read_text())["gallery"]["faces"] == 4
    assert list(report.parent.glob("*.png")) == []
    assert leakage(store, "--gallery", gallery, "--pictures") == 0
    assert (report.parent / "pairs_first.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_is_refused_in_one_line(store, tmp_path, capsys):
    gallery = save_pictures(tmp_path / "people", range(4))
    file = tmp_path / "gallery.npz"
    np.savez(file, embeddings=np.eye(5, 16, dtype=np.float32))
    for options, message in (
        (
            ["--gallery", gallery, "--policy", "flag"],
            "6 impostor pairs, too few for a threshold at FMR 1e-05",
        ),
        (["--gallery", file, "--pictures"], "embeddings, which show nothing"),
        (["--gallery", gallery, *["--recogniser", "a"] * 3], "recognisers"),
        (["--gallery", gallery, "--detector-size", 100], "multiple of 32"),
    ):
        assert leakage(store, *options) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1] and said[-1].startswith("Error: ")


def test_the_dry_run_says_what_it_takes(store, tmp_path, capsys):
    before = sorted(store.rglob("*"))
    gallery = save_pictures(tmp_path / "people", range(9))
    assert leakage(store, "--gallery", gallery, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "9 images" in said and "24 x 9" in said and "Memory of a process" in said
    assert sorted(store.rglob("*")) == before
