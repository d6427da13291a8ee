"""The stage `contexts` with every source: what it reads and refuses, what moves it, what is made together."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from context_material import save_generator_with_empty_context, save_pack, save_pictures
from pydantic import ValidationError
from stage_builds import EXECUTION, changed, make
from typer.testing import CliRunner

from flows import cli
from flows.contexts import contexts as contexts_command
from flows.contexts import spreads
from negfacediff_core import contexts
from negfacediff_core.config import CONTEXT_FIELDS, ContextsConfig, ContextSource
from negfacediff_core.errors import ConfigError, ContextsError, NegFaceDiffError, StoreError, WeightsError
from negfacediff_core.stages import context_sources
from negfacediff_core.stages import contexts as stage
from negfacediff_core.store.layout import Unit
from negfacediff_core.store.shards import prepare, read_arrays, read_rows


@pytest.fixture(scope="module")
def material(tiny_pack, tmp_path_factory):
    """Everything that a source can read."""
    folder = tmp_path_factory.mktemp("material")
    save_pack(folder / "pack", tiny_pack)
    save_generator_with_empty_context(folder / "generator", tiny_pack)
    save_pictures(folder / "photos", range(7))
    known = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    np.savez(folder / "known.npz", contexts=known)
    return folder


@pytest.fixture
def build(tiny_build, material):
    """Give the tiny build another source, with what that source reads."""

    def with_source(source, **changes):
        places = {
            "file": "known.npz",
            "folder": "photos",
            "generator": "generator",
            "recogniser": "pack",
        }
        settings = {f"contexts__{name}": str(material / place) for name, place in places.items()}
        read = CONTEXT_FIELDS[source]
        chosen = {key: value for key, value in settings.items() if key.removeprefix("contexts__") in read}
        if source == "two_stage":
            chosen["contexts__steps"] = 2
        return changed(tiny_build, contexts__source=source, **chosen, **changes)

    return with_source


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stage, "BLOCK", 4)
    monkeypatch.setattr(stage, "BLOCK_OF_IMAGES", 4)


def planned(build, store):
    spec = stage.plan(build, str(store), {})
    prepare(spec)
    return spec


def made(build, store, reverse=False):
    """All contexts of a build's extent."""
    spec = planned(build, store)
    for unit in sorted(spec.grid.units(), reverse=reverse):
        stage.run_unit(spec, unit, EXECUTION)
    return stage.contexts_of(spec, np.arange(spec.grid.identities))


def test_the_tables_of_sources_agree():
    assert set(ContextSource) == set(contexts.SOURCES) == set(CONTEXT_FIELDS)
    assert set(contexts.SOURCES) > contexts.REDRAWN
    assert {name for fields in CONTEXT_FIELDS.values() for name in fields} < set(ContextsConfig.model_fields)


@pytest.mark.parametrize("source", contexts.SOURCES)
def test_every_source_fills_its_stage_in_any_order(source, build, tmp_path):
    found = made(build(source), tmp_path / "one")
    again = made(build(source), tmp_path / "two", reverse=True)
    assert found.shape == (5, 16) and found.dtype == np.float32
    np.testing.assert_array_equal(found, again)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    spec = planned(build(source), tmp_path / "one")
    rows = read_rows(spec, Unit(0, 0))
    assert set(rows.column("source").to_pylist()) == {source}


@pytest.mark.parametrize("source", sorted(set(contexts.SOURCES) - {"packed"}))
def test_a_dataset_grows_and_no_context_moves(source, build, tmp_path):
    few = made(build(source, identities=3), tmp_path)
    more = made(build(source, identities=7), tmp_path)
    np.testing.assert_array_equal(few, more[:3])


def test_the_source_folder_is_the_embedding_of_each_picture(build, material, tmp_path):
    found = made(build("folder", identities=7), tmp_path)
    cosines = found @ found.T
    assert cosines[~np.eye(7, dtype=bool)].max() < 1 - 1e-5
    shutil.copytree(material / "photos", tmp_path / "people" / "only")
    for seed, name in enumerate(("a", "b"), start=10):
        save_pictures(tmp_path / "people" / name, [seed])
    people = changed(build("folder", identities=3), contexts__folder=str(tmp_path / "people"))
    grouped = made(people, tmp_path / "grouped" / "store")
    np.testing.assert_allclose(grouped[2], contexts.normalise(found.mean(axis=0)[None])[0], atol=1e-5)


# --- made together


def test_packed_contexts_are_made_in_one_unit_that_cannot_grow(build, tmp_path):
    small = build("packed", contexts__count=20)
    spec = planned(small, tmp_path)
    assert (spec.grid.units(), spec.grid.limit) == ([Unit(0, 0)], 20)
    stage.run_unit(spec, Unit(0, 0), EXECUTION)
    found = read_arrays(spec, Unit(0, 0))["context"]
    np.testing.assert_array_equal(found, contexts.packed(0, 20, 16, 200))
    nearest = read_rows(spec, Unit(0, 0)).column("nearest").to_numpy()
    np.testing.assert_allclose(nearest, contexts.closest(found).cosine, atol=1e-6)
    assert nearest.max() < contexts.closest(contexts.uniform(0, np.arange(20), 16)).cosine.max() - 0.2
    assert planned(changed(small, identities=20), tmp_path).fingerprint == spec.fingerprint
    with pytest.raises(ContextsError, match=r"21 identities are needed .* but 20 contexts are made together"):
        stage.plan(changed(small, identities=21), str(tmp_path), {})


@pytest.mark.parametrize("changes", [{"contexts__source": "packed"}, {"contexts__max_cosine": 0.9}])
def test_without_a_count_it_is_that_of_the_first_build_of_this_name(changes, tiny_build, tmp_path):
    first = changed(tiny_build, **changes)
    specs = make(first, tmp_path, stages=("contexts",))
    assert specs["contexts"].config["count"] == 5
    with pytest.raises(ContextsError, match=r"6 identities are needed .* but 5 contexts"):
        stage.plan(changed(first, identities=6), str(tmp_path), {})
    again = stage.plan(changed(first, identities=4), str(tmp_path), {})
    assert again.fingerprint == specs["contexts"].fingerprint
    other = stage.plan(changed(first, identities=6, name="other"), str(tmp_path), {})
    assert other.config["count"] == 6
    reseeded = stage.plan(changed(first, identities=6, contexts__seed=1), str(tmp_path), {})
    assert reseeded.config["count"] == 6


@pytest.mark.parametrize("source", sorted(contexts.REDRAWN))
def test_the_bound_holds_for_every_drawn_source(source, build, tmp_path):
    free = made(build(source), tmp_path / "free")
    nearest = np.sort(contexts.closest(free).cosine)
    bound = float(nearest[-1]) - 1e-6  # the closest pair is too close
    spec = planned(build(source, contexts__max_cosine=bound), tmp_path / "bound")
    stage.run_unit(spec, Unit(0, 0), EXECUTION)
    found, rows = read_arrays(spec, Unit(0, 0))["context"], read_rows(spec, Unit(0, 0))
    assert contexts.closest(found).cosine.max() < bound
    attempts = rows.column("attempts").to_numpy()
    first = attempts == 0
    assert first[0] and not first.all()
    np.testing.assert_allclose(found[first], free[first], atol=1e-5)


def test_a_file_with_two_identities_too_close_is_refused_while_planning(build, material, tmp_path):
    known = contexts.load_reference(material / "known.npz", 16)
    near = contexts.closest(known[:5])
    bound = float(near.cosine.max()) - 1e-3
    pair = "|".join(f"{i} and {near.other[i]}" for i in np.argsort(near.cosine)[-2:])
    with pytest.raises(ContextsError, match=f"identities ({pair}) have a cosine"):
        stage.plan(build("file", contexts__max_cosine=bound), str(tmp_path), {})
    made(build("file", contexts__max_cosine=bound + 0.01), tmp_path)


def test_a_folder_with_two_identities_too_close_fails_with_the_pair(build, tmp_path):
    spec = planned(build("folder", contexts__max_cosine=0.01), tmp_path)
    with pytest.raises(
        ContextsError, match=r"identities \d and \d have a cosine of .* take one of each pair"
    ):
        stage.run_unit(spec, Unit(0, 0), EXECUTION)


def test_a_bound_that_no_directions_meet_is_refused_while_planning(build, tmp_path):
    with pytest.raises(ContextsError, match="no 5 directions in 16 dimensions"):
        stage.plan(build("uniform", contexts__max_cosine=-0.3), str(tmp_path), {})


# --- what changes the result moves its place


def test_the_simple_sources_keep_their_places(build, tmp_path):
    for source, settings in {"uniform": {"seed": 0}, "fitted": {"seed": 0}, "file": {}}.items():
        spec = stage.plan(build(source), str(tmp_path), {})
        assert spec.config == {"source": source, "width": 16, **settings}
        assert set(spec.weights) == ({"contexts"} if source != "uniform" else set())


@pytest.mark.parametrize("source", ["fitted", "file", "mixup"])
def test_a_zarr_is_hashed_whole(source, build, material, tmp_path):
    known = contexts.load_contexts(material / "known.npz").contexts
    place = tmp_path / "known.zarr"
    zarr.create_group(place).create_array("contexts", data=known, chunks=(3, 16))
    chosen = changed(build(source), contexts__file=str(place))
    spec = planned(chosen, tmp_path / "store")
    shutil.move(place, tmp_path / "moved.zarr")
    moved = stage.plan(changed(chosen, contexts__file=str(tmp_path / "moved.zarr")), str(tmp_path), {})
    assert moved.fingerprint == spec.fingerprint
    place = tmp_path / "moved.zarr"
    zarr.open_array(place / "contexts")[8, 0] = 5
    assert stage.plan(changed(chosen, contexts__file=str(place)), str(tmp_path), {}).fingerprint != (
        spec.fingerprint
    )
    with pytest.raises(WeightsError, match="has changed since this build was planned"):
        stage.run_unit(replace(spec, weights=moved.weights), Unit(0, 0), EXECUTION)


def test_a_folder_of_images_is_hashed_by_what_counts(build, material, tmp_path):
    place = shutil.copytree(material / "photos", tmp_path / "photos")
    chosen = changed(build("folder"), contexts__folder=str(place))
    before = stage.plan(chosen, str(tmp_path), {}).fingerprint
    (place / "notes.txt").write_text("not an image")
    assert stage.plan(chosen, str(tmp_path), {}).fingerprint == before
    shutil.move(place / "006.png", place / "007.png")
    assert stage.plan(chosen, str(tmp_path), {}).fingerprint != before


# --- bad input


@pytest.mark.parametrize("source", sorted(set(ContextSource) - {"uniform", "two_stage", "packed"}))
def test_a_source_without_its_file_or_folder_is_refused(source):
    needed = "folder" if source == "folder" else "file"
    with pytest.raises(ValidationError, match=f"context source {source} needs `{needed}`"):
        ContextsConfig(source=source)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"source": "uniform", "file": "a.npz"},
            "uniform does not read contexts.file, .*fitted or file or mixup",
        ),
        ({"source": "packed", "margin": 0.1}, "packed does not read contexts.margin, which is 0.1"),
        ({"source": "two_stage", "folder": "x"}, "two_stage does not read contexts.folder"),
        ({"source": "uniform", "count": 5}, "with the source packed, or with max_cosine below 1"),
        ({"source": "mixup", "file": "a", "packing_steps": 3}, "mixup does not read contexts.packing_steps"),
        ({"source": "uniform", "detector_size": 64}, "the source folder or two_stage"),
    ],
)
def test_fields_of_another_source_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        ContextsConfig(**settings)


def test_a_count_goes_with_a_bound():
    assert ContextsConfig(max_cosine=0.5, count=7).joint
    assert ContextsConfig(source="packed", count=7).joint
    assert not ContextsConfig(seed=3).joint


def spoiled(values):
    """Known identities with one thing wrong."""
    known = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float32)
    return values(known)


@pytest.mark.parametrize("source", ["fitted", "file", "mixup"])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: np.where(np.arange(9)[:, None] == 6, np.nan, c), "NaN or infinity in row 6"),
        (lambda c: np.where(np.arange(9)[:, None] == 3, 0, c), "zero length in row 3"),
        (lambda c: c[np.r_[0:7, 2, 8]], r"row 7 \(row 7 equals row 2\)"),
        (lambda c: c[:, :12], "width 16"),
        (lambda c: c.astype(str), "of type <U"),
    ],
)
def test_unusable_embeddings_are_refused_while_planning(source, spoil, message, build, tmp_path):
    np.savez(tmp_path / "bad.npz", contexts=spoiled(spoil))
    with pytest.raises(ContextsError, match=message):
        stage.plan(changed(build(source), contexts__file=str(tmp_path / "bad.npz")), str(tmp_path), {})


@pytest.mark.parametrize("source, has, noun", [("file", 9, "only 9 contexts"), ("folder", 7, "images of 7")])
def test_more_identities_than_there_are_is_refused(source, has, noun, build, tmp_path):
    with pytest.raises(ContextsError, match=f"{has + 1} identities were asked for but .*{noun}"):
        stage.plan(build(source, identities=has + 1), str(tmp_path), {})
    with pytest.raises(ContextsError, match=f"{has + 1} identities were asked for but .*{noun}"):
        stage.plan(build(source, negatives__pool=has + 1), str(tmp_path), {})
    assert stage.plan(build(source, identities=has), str(tmp_path), {}).grid.limit == has


@pytest.mark.parametrize(
    "source, changes, error, message",
    [
        ("folder", {"contexts__folder": "no/such"}, WeightsError, "nothing at no/such"),
        ("folder", {"contexts__folder": __file__}, ContextsError, "contexts.folder is .* a file"),
        ("two_stage", {"contexts__generator": "no/such"}, WeightsError, "nothing at no/such"),
        ("two_stage", {"contexts__steps": 51}, ConfigError, r"contexts\.steps is 51.* 50 timesteps"),
        ("folder", {"contexts__recogniser": "packs/demo/faces"}, ContextsError, "width 20, but .* width 16"),
    ],
)
def test_what_a_source_reads_is_checked_while_planning(source, changes, error, message, build, tmp_path):
    with pytest.raises(error, match=message):
        stage.plan(changed(build(source), **changes), str(tmp_path), {})


def test_a_generator_without_an_empty_context_is_refused(build, tiny_pack, tmp_path):
    plain = changed(build("two_stage"), contexts__generator=str(tiny_pack / "generator"))
    with pytest.raises(WeightsError, match=r"learned no empty context; set contexts\.generator"):
        stage.plan(plain, str(tmp_path), {})


def test_a_recogniser_that_the_generator_was_not_trained_with_is_refused(build, monkeypatch, tmp_path):
    monkeypatch.setattr(context_sources, "conditioner_hash", lambda path: "0" * 64)
    with pytest.raises(ConfigError, match="trained with another recogniser"):
        stage.plan(build("folder"), str(tmp_path), {})


def test_a_picture_without_a_face_fails_its_unit_by_name(build, material, tmp_path):
    place = shutil.copytree(material / "photos", tmp_path / "photos")
    save_pictures(place, [2], face=False)
    spec = planned(changed(build("folder"), contexts__folder=str(place)), tmp_path / "store")
    with pytest.raises(NegFaceDiffError, match=r"1 identities show no face .*002\.png"):
        stage.run_unit(spec, Unit(0, 0), EXECUTION)


# --- how close they are, as the command shows it


def test_the_spread_of_each_run_is_shown_beside_a_uniform_draw(tiny_build, tmp_path, capsys):
    store = tmp_path / "store"
    make(changed(tiny_build, name="even", contexts__source="packed", identities=40), store, ("contexts",))
    make(changed(tiny_build, name="random", identities=40), store, ("contexts",))
    make(changed(tiny_build, name="unmade", contexts__seed=1), store, ())
    even, random = spreads(str(store), 10_000)
    assert (even.run, even.source, random.run, random.identities) == ("even", "packed", "random", 40)
    assert random.worst == random.uniform_worst == even.uniform_worst
    assert even.worst < random.worst - 0.3 and even.worst > even.bound == 0
    assert next(spreads(str(store), 16)).identities == 16
    shown = CliRunner().invoke(cli.app, ["contexts", str(store)])
    assert shown.exit_code == 0
    assert f"{even.worst:.3f}" in shown.output and f"{random.worst:.3f}" in shown.output
    with pytest.raises(StoreError, match=r"No run in .* has its contexts yet"):
        contexts_command(str(tmp_path / "nothing"))
