"""Whatever a file holds that people or accidents have been at: a clear error or success, never anything else.

Where reading succeeds, what is read from a store is what was committed. Nothing takes forever either.
"""

import json
import shutil
import signal
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zarr
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_stage import commit, content_of, make_spec
from test_fingerprints import all_fields

from flows.presets import check_execution, load_build, preset_texts
from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.contexts import load_contexts, load_identities
from negfacediff_core.errors import DamagedError, NegFaceDiffError
from negfacediff_core.store import shards, tables
from negfacediff_core.store.gc import find_rubbish
from negfacediff_core.store.layout import adopt, read_spec
from negfacediff_core.store.records import pending, records
from negfacediff_core.store.repair import failed_units, repair
from negfacediff_core.store.runs import read_runs, write_run
from negfacediff_core.store.status import status
from negfacediff_core.store.verify import check_units, survey

LONGEST_MESSAGE = 3000
SECONDS = 120

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
odd = st.sampled_from(
    [10**30, -(10**30), 1e308, "9" * 5000, "../../x", "NaN", "null", "\0", "[", "x" * 10**4]
)
values = st.recursive(
    scalars | odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars | odd, inner, max_size=3),
    max_leaves=5,
)
# What YAML knows beside plain values, and what has broken parsers of it.
fragments = st.sampled_from(
    [
        "2001-13-45",
        "!!int x",
        "!!timestamp x",
        "!!python/object/apply:os.system ['exit 1']",
        "&a [*a]",
        "*nowhere",
        "<<: 1",
        "? {a: b}\n: c\n",
        "9" * 5000,
        "0x",
        ".inf",
        "\t",
        "\0",
        "---\n",
        "{",
        "[" * 500,
        "%YAML 9.9\n",
        "\ufeff",
        "!!binary '",
        "!!set {a}",
    ]
)


@pytest.fixture(autouse=True)
def no_hang():
    """A test that takes too long ends with the place where it hangs."""

    def expired(number, frame):
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def harmless(work):
    """Do `work`: it succeeds, or says in one short paragraph why not."""
    try:
        return work()
    except NegFaceDiffError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < LONGEST_MESSAGE, said[:LONGEST_MESSAGE]


@st.composite
def damages(draw, data):
    """Bytes like `data`, with a few changed, cut off, put in, or, in a JSON object, with another value."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "value"]))
    place = draw(st.integers(0, len(data) - 1))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "insert" or not data.startswith(b"{"):
        put = draw(st.sampled_from([b"null", b"-1", b"1e999", b"[]", b"99999999999", b"\xff", b'"'] * 2))
        return data[:place] + put + data[place + draw(st.integers(0, 4)) :]
    content = json.loads(data)
    node, steps = content, 0
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        steps += 1
        if not (isinstance(node[key], dict | list) and node[key]) or draw(st.booleans()):
            break
        node = node[key]
    node[key] = draw(values.filter(lambda value: "9" * 5000 not in repr(value)))
    return json.dumps(content, default=str, skipkeys=True).encode()


# --- configuration -----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from(sorted(preset_texts())), st.sampled_from(list(all_fields(BuildConfig))), values)
def test_any_value_of_any_field(tmp_path_factory, preset, field, value):
    content = yaml.safe_load(preset_texts()[preset])
    *sections, name = field.split("__")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
    file = tmp_path_factory.mktemp("config") / "build.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8", errors="replace")
    harmless(lambda: load_build(str(file)))
    harmless(lambda: load_build(preset, [f"{field.replace('__', '.')}={value}"]))


@settings(max_examples=60)
@given(st.data())
def test_any_text_in_a_build_file(tmp_path_factory, data):
    text = preset_texts()[data.draw(st.sampled_from(sorted(preset_texts())))]
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 40)))
    put = data.draw(fragments | st.text(max_size=10))
    file = tmp_path_factory.mktemp("config") / "build.yaml"
    file.write_bytes((text[:start] + put + text[stop:]).encode("utf-8", "surrogatepass"))
    harmless(lambda: load_build(str(file)))


@settings(max_examples=60)
@given(st.text() | fragments)
@example("samples.w=[[[")
@example("=")
def test_any_setting_on_the_command_line(setting):
    harmless(lambda: load_build("demo", [setting]))
    harmless(lambda: load_build("demo", [f"samples.steps={setting}"]))


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(list(ExecutionConfig.model_fields)) | st.text(max_size=5), values))
def test_any_execution(content):
    harmless(lambda: check_execution(content))


def test_a_few_lines_that_stand_for_gigabytes_make_no_long_message(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join(['*' + last] * 9)}]")
    (tmp_path / "laughs.yaml").write_text("\n".join([*lines, "name: *i"]))
    with pytest.raises(NegFaceDiffError) as error:
        load_build(str(tmp_path / "laughs.yaml"))
    assert len(str(error.value)) < LONGEST_MESSAGE


# --- stores ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A committed stage of two units with a run, and all its files by path."""
    store = tmp_path_factory.mktemp("fuzz") / "store"
    spec = make_spec(store, inputs={})
    shards.prepare(spec)
    for unit in spec.grid.units():
        commit(spec, unit)
    extent = {"fingerprint": spec.fingerprint, "identities": 6, "replicates": 4}
    write_run(str(store), "run", {"stages": {"samples": extent}})
    files = {path: path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}
    return spec, {path: data for path, data in files.items() if data}


def read_units(spec):
    """Everything of a stage as a later stage reads it; what is read must be what was committed."""
    for unit in spec.grid.units():
        arrays, rows = content_of(spec, unit)
        found = shards.read_arrays(read_spec(spec.store, spec.name, spec.fingerprint), unit)
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
        assert shards.read_rows(spec, unit).equals(rows)


@settings(max_examples=150)
@given(st.data())
def test_any_damage_to_a_store_is_an_error_or_no_harm(stored, data):
    spec, files = stored
    path = data.draw(st.sampled_from(list(files)))
    path.write_bytes(data.draw(damages(files[path])))
    try:
        harmless(lambda: read_units(spec))
        harmless(lambda: records(spec))
        harmless(lambda: status(spec.store))
        harmless(lambda: read_runs(spec.store))
        harmless(lambda: adopt(spec))
        harmless(lambda: shards.prepare(spec))
    finally:
        for each, content in files.items():
            if each.read_bytes() != content:
                each.write_bytes(content)


def look_over(store):
    """Check a store, look for rubbish, and mend it, as verify, gc and verify --repair do.

    Returns what was found, and whether something was left for a person to mend.
    """
    found = harmless(lambda: survey(store))
    findings = [] if found is None else [*found.findings, *check_units(found.units, workers=1)]
    for finding in findings:
        assert finding.problem and "\n" not in finding.problem and len(finding.problem) < LONGEST_MESSAGE
    harmless(lambda: find_rubbish(store))
    harmless(lambda: failed_units(store, "run"))
    mended = harmless(lambda: repair(store, findings))
    return findings, mended is None or bool(mended.left)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_a_store_is_found_and_what_can_be_mended_is(stored, tmp_path, data):
    """What `verify` has found and `--repair` has mended is made again by the next build, to the same."""
    spec, files = stored
    store = tmp_path / "store"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(spec.store, store)
    path = data.draw(st.sampled_from(list(files)))
    damaged = data.draw(damages(files[path]))
    (store / path.relative_to(spec.store)).write_bytes(damaged)
    findings, left = look_over(str(store))
    of_a_unit = path.parent.name in ("done", "rows") or path.name.startswith("c.")
    if of_a_unit and damaged != files[path] and not means_the_same(files[path], damaged):
        assert findings, "damage to a unit that verify does not see"
    again = make_spec(store, inputs={})
    try:
        shards.prepare(again)
        for unit in pending(again):
            commit(again, unit)
    except NegFaceDiffError:
        assert left
    else:
        read_units(again)


def means_the_same(data, damaged):
    """Whether two records say the same but for their checksum, which the first ones did not have."""
    try:
        before, after = json.loads(data), json.loads(damaged)
        return {**before, "checksum": None} == {**after, "checksum": None}
    except (ValueError, TypeError, RecursionError):
        return False


@settings(max_examples=100)
@given(st.data())
def test_any_part_that_is_no_part_is_an_error(stored, data):
    spec, files = stored
    part = next(content for path, content in files.items() if path.suffix == ".parquet")
    with suppress(DamagedError):
        assert tables.parse_part(spec, data.draw(damages(part))).schema.equals(tables.schema(spec))


@pytest.mark.parametrize("number", [10**30, 10**12, -1, 1.5, "many", None])
def test_an_impossible_extent_of_a_run_neither_fills_the_memory_nor_counts(stored, number, tmp_path):
    spec, _ = stored
    shutil.copytree(spec.store, tmp_path / "store")
    run = tmp_path / "store/runs/run.json"
    content = json.loads(run.read_text())
    content["stages"]["samples"]["identities"] = number
    run.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=r"run\.json is damaged"):
        status(str(tmp_path / "store"))


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../outside", "rows/../../../outside", ""])
def test_a_record_cannot_name_files_outside_its_stage(stored, path, tmp_path):
    spec, _ = stored
    shutil.copytree(spec.store, tmp_path / "store")
    moved = make_spec(tmp_path / "store", inputs={})
    file = tmp_path / "store" / spec.path / "done" / "00000-000.json"
    content = json.loads(file.read_text())
    content.pop("checksum", None)
    content["sha256"][path] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match="no path of a unit's file"):
        records(moved)


# --- contexts ----------------------------------------------------------------------------------------------

VECTORS = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
NAMES = list("abcde")


def write_contexts(folder):
    """Contexts in every form that is read: their paths."""
    np.savez(folder / "arrays.npz", contexts=VECTORS, names=np.array(NAMES))
    np.savez(folder / "fitted.npz", mean=VECTORS[0], covariance=np.eye(8))
    np.save(folder / "plain.npy", VECTORS)
    pq.write_table(pa.table({"contexts": list(VECTORS), "name": NAMES}), folder / "table.parquet")
    published = dict(zip(NAMES, VECTORS, strict=True))
    torch.save(published, folder / "published.npy")
    torch.save(published, folder / "legacy.npy", _use_new_zipfile_serialization=False)
    zarr.open_group(folder / "group.zarr", mode="w")["contexts"] = VECTORS
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def context_files(tmp_path_factory):
    places = write_contexts(tmp_path_factory.mktemp("contexts"))
    found = [
        (place, file)
        for place in places
        for file in ([place] if place.is_file() else sorted(place.rglob("*")))
        if file.is_file()
    ]
    return [(place, file, file.read_bytes()) for place, file in found]


@settings(max_examples=150)
@given(st.data())
def test_any_damage_to_a_file_of_contexts(context_files, data):
    place, file, content = data.draw(st.sampled_from(context_files))
    file.write_bytes(data.draw(damages(content)))
    try:
        loaded = harmless(lambda: load_contexts(place))
        assert loaded is None or loaded.contexts.dtype == np.float32
        harmless(lambda: load_identities(place))
    finally:
        file.write_bytes(content)
