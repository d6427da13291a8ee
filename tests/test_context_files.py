"""Files of embeddings: every format, read without running code, and what is wrong with a file in words."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from negfacediff_core import contexts
from negfacediff_core.errors import ContextsError

VECTORS = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
NAMES = ("a", "b", "ç", "d", "e", "f")


def write_npz(path, vectors, names):
    np.savez(path, contexts=vectors, names=np.array(names))


def write_published(path, vectors, names):
    torch.save(dict(zip(names, vectors, strict=True)), path)


def write_parquet(path, vectors, names):
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    pq.write_table(pa.table({"name": list(names), "embedding": fixed}), path, row_group_size=4)


def write_lists(path, vectors, names):
    pq.write_table(pa.table({"context": vectors.tolist(), "name": list(names)}), path)


def write_zarr(path, vectors, names):
    group = zarr.create_group(path)
    group.create_array("contexts", data=vectors, chunks=(4, 5))


def write_zarr_array(path, vectors, names):
    zarr.create_array(path, data=vectors)


def write_zarr_of_version_2(path, vectors, names):
    zarr.create_group(path, zarr_format=2).create_array("embeddings", data=vectors)


FORMATS = {
    "npz": ("c.npz", write_npz),
    "published": ("c.npy", write_published),
    "parquet": ("c.parquet", write_parquet),
    "parquet with lists": ("lists.parquet", write_lists),
    "zarr": ("c.zarr", write_zarr),
    "zarr array": ("array.zarr", write_zarr_array),
    "zarr 2": ("two.zarr", write_zarr_of_version_2),
}


@pytest.mark.parametrize("name, write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_vectors_that_were_written(name, write, tmp_path):
    write(tmp_path / name, VECTORS, NAMES)
    loaded = contexts.load_contexts(tmp_path / name)
    np.testing.assert_array_equal(loaded.contexts, VECTORS)
    assert loaded.contexts.dtype == np.float32
    assert loaded.names == (() if "zarr" in name else NAMES)
    unit = contexts.load_reference(tmp_path / name, 5)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert contexts.load_identities(tmp_path / name).mean.shape == (5,)


def test_a_zarr_group_may_hold_names(tmp_path):
    write_zarr(tmp_path / "c.zarr", VECTORS, NAMES)
    codes = np.arange(6) + 100
    zarr.open_group(tmp_path / "c.zarr").create_array("name", data=codes)
    assert contexts.load_contexts(tmp_path / "c.zarr").names == tuple(map(str, codes))


def test_a_stored_distribution_is_used_as_it_is(tmp_path):
    fit = contexts.fit_identities(contexts.normalise(VECTORS))
    np.savez(tmp_path / "fit.npz", mean=fit.mean, covariance=fit.covariance)
    np.savez(tmp_path / "rows.npz", contexts=VECTORS)
    stored, made = (contexts.load_identities(tmp_path / name) for name in ("fit.npz", "rows.npz"))
    np.testing.assert_allclose(stored.mean, made.mean, atol=1e-7)
    np.testing.assert_allclose(stored.covariance, made.covariance, atol=1e-7)


@pytest.mark.parametrize("name, write", FORMATS.values(), ids=FORMATS)
def test_unusable_vectors_are_named_in_every_format(name, write, tmp_path):
    broken = VECTORS.copy()
    broken[3, 1] = np.nan
    write(tmp_path / name, broken, NAMES)
    with pytest.raises(ContextsError, match="NaN or infinity in row 3"):
        contexts.load_reference(tmp_path / name, 5)
    with pytest.raises(ContextsError, match=r"shape \(6, 5\) do not fit .* width 7"):
        contexts.load_reference(tmp_path / name, 7)


@pytest.mark.parametrize("name, write", FORMATS.values(), ids=FORMATS)
def test_values_that_are_no_floating_point_numbers_are_refused(name, write, tmp_path):
    write(tmp_path / name, (100 * VECTORS).astype(np.int32), NAMES)
    with pytest.raises(ContextsError, match=r"of type int(32|64): .* floating-point"):
        contexts.load_contexts(tmp_path / name)


@pytest.mark.parametrize(
    "column, message",
    [
        ([1.0, 2.0, 3.0], "column context of double: embeddings are lists"),
        (["a", "b", "c"], "column context of string: embeddings are lists"),
        ([[1.0, 2.0], [3.0], [4.0, 5.0]], "not equally long"),
        ([[1.0, 2.0], None, [4.0, 5.0]], "empty, or not equally long"),
        ([[1.0, 2.0], [None, 1.0], [4.0, 5.0]], "empty, or not equally long"),
        ([["a"], ["b"], ["c"]], "of type object"),
    ],
)
def test_parquet_columns_that_hold_no_vectors_are_refused(column, message, tmp_path):
    pq.write_table(pa.table({"context": column}), tmp_path / "c.parquet")
    with pytest.raises(ContextsError, match=rf"contexts file .*c\.parquet .*{message}"):
        contexts.load_contexts(tmp_path / "c.parquet")


def test_names_of_arrays_and_columns_are_told(tmp_path):
    np.savez(tmp_path / "c.npz", vectors=VECTORS)
    pq.write_table(pa.table({"vector": VECTORS.tolist(), "who": list(NAMES)}), tmp_path / "c.parquet")
    zarr.create_group(tmp_path / "c.zarr").create_array("vectors", data=VECTORS)
    zarr.create_group(tmp_path / "empty.zarr")
    for name, there in {
        "c.npz": "vectors",
        "c.parquet": "vector, who",
        "c.zarr": "vectors",
        "empty.zarr": "nothing",
    }.items():
        with pytest.raises(ContextsError, match=rf"{name} holds {there}, but none of contexts, context"):
            contexts.load_contexts(tmp_path / name)


def test_two_lengths_of_one_direction_are_one_identity(tmp_path):
    np.savez(tmp_path / "c.npz", contexts=np.concatenate([VECTORS, 2 * VECTORS[2:3]]))
    with pytest.raises(ContextsError, match=r"row 6 \(row 6 equals row 2\)"):
        contexts.load_reference(tmp_path / "c.npz", 5)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.float32(0), np.eye(3), r"a mean \(\) float32"),
        (np.array(["a", "b"]), np.eye(2), r"a mean \(2,\) <U1"),
        (np.zeros(3), np.eye(2), r"a covariance \(2, 2\) float64"),
        (np.array([np.nan, 1.0]), np.eye(2), "finite"),
        (np.zeros(2), np.zeros((2, 2)), "a single point without direction"),
    ],
)
def test_distributions_that_cannot_be_drawn_from_are_refused(mean, covariance, message, tmp_path):
    np.savez(tmp_path / "reference.npz", mean=mean, covariance=covariance)
    with pytest.raises(ContextsError, match=message):
        contexts.load_identities(tmp_path / "reference.npz")


def test_as_many_names_as_vectors(tmp_path):
    np.savez(tmp_path / "c.npz", contexts=VECTORS, names=np.array(NAMES[:4]))
    with pytest.raises(ContextsError, match="4 names for 6 contexts"):
        contexts.load_contexts(tmp_path / "c.npz")


@pytest.mark.parametrize("name", ["none.npz", "none.npy", "none.parquet", "none.zarr"])
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(ContextsError, match=rf"{name} does not exist"):
        contexts.load_contexts(tmp_path / name)


def test_a_folder_that_is_no_zarr_says_so(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("no array")
    with pytest.raises(ContextsError, match=r"folder cannot be read .*Zarr"):
        contexts.load_contexts(tmp_path / "folder")


class Exploit:
    """Pickles to a call that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, legacy):
    witness = tmp_path / "witness"
    payload = {"a": VECTORS[0], "b": Exploit(witness)}
    torch.save(payload, tmp_path / "c.npy", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ContextsError, match="could run code"):
        contexts.load_contexts(tmp_path / "c.npy")
    assert not witness.exists()


def test_an_object_array_is_refused(tmp_path):
    np.savez(tmp_path / "c.npz", contexts=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ContextsError, match="cannot be read"):
        contexts.load_contexts(tmp_path / "c.npz")


@pytest.mark.parametrize(
    "name, content",
    [
        ("c.npz", b"not a zip"),
        ("c.npz", b""),
        ("c.parquet", b""),
        ("c.parquet", b"PAR1 and no more"),
        ("c.npy", b""),
        ("c.npy", b"\x00" * 64),
        ("c.npy", pickle.dumps([1, 2, 3], protocol=2)),
        ("c.npy", b"\x80\x04N."),
        *(("c.npy", text) for text in (b"hello world", b"just some text\n", b"gone", b"0" * 64)),
        *(("c.npy", np.random.default_rng(seed).bytes(300)) for seed in range(40)),
    ],
)
def test_unreadable_files_say_so(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ContextsError, match=r"contexts file .*c\.(np|parquet)"):
        contexts.load_contexts(tmp_path / name)


@pytest.mark.parametrize("name", ["c.npz", "c.npy", "c.parquet"])
@pytest.mark.parametrize("read", [contexts.load_contexts, contexts.load_identities])
def test_damaged_files_say_so(name, read, tmp_path):
    path = tmp_path / name
    dict(FORMATS.values())[name](path, VECTORS, NAMES)
    whole = path.read_bytes()
    middle = len(whole) // 2
    overwritten = whole[:40] + bytes(middle - 40) + whole[middle:]
    for damaged in (whole[:middle], whole[:-1], whole[: middle // 8], overwritten):
        path.write_bytes(damaged)
        with pytest.raises(ContextsError, match=r"contexts file .*c\.(np|parquet)"):
            read(path)


def test_a_damaged_zarr_says_so(tmp_path):
    write_zarr(tmp_path / "c.zarr", VECTORS, NAMES)
    chunk = tmp_path / "c.zarr" / "contexts" / "c" / "0" / "0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ContextsError, match=r"c\.zarr cannot be read"):
        contexts.load_contexts(tmp_path / "c.zarr")
    chunk.unlink()
    with pytest.raises(ContextsError, match="zero length in rows 0, 1, 2, 3"):
        contexts.load_reference(tmp_path / "c.zarr", 5)
