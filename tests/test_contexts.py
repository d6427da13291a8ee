"""Contexts: drawn per identity, loaded without running code, checked with the rows named."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core import contexts
from negfacediff_core.errors import ContextsError

WIDTH = 24


def reference(count=40, width=WIDTH, seed=0):
    """Identities that spread mostly over a few directions, around a mean that is not zero."""
    random = np.random.default_rng(seed)
    spread = np.geomspace(1, 0.05, width)
    return contexts.normalise(random.standard_normal((count, width)) * spread + 0.3)


def draw(source, seed, identities, tmp_path):
    file = None
    if source != "uniform":
        file = tmp_path / "reference.npz"
        np.savez(file, contexts=reference())
    return contexts.SOURCES[source](seed, np.asarray(identities), WIDTH, file)


@pytest.mark.parametrize("source", contexts.SOURCES)
def test_every_source_gives_unit_vectors_that_stay_when_identities_are_added(source, tmp_path):
    few = draw(source, 3, range(5), tmp_path)
    many = draw(source, 3, range(33), tmp_path)
    assert few.dtype == np.float32 and few.shape == (5, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(few, many[:5])
    np.testing.assert_array_equal(draw(source, 3, [30, 2, 7], tmp_path), many[[30, 2, 7]])
    contexts.check_contexts(many, WIDTH, identities=33)


@pytest.mark.parametrize("source", ["uniform", "fitted"])
def test_another_seed_gives_other_contexts(source, tmp_path):
    assert not np.allclose(
        draw(source, 0, range(4), tmp_path), draw(source, 1, range(4), tmp_path), atol=1e-2
    )


def test_uniform_contexts_have_no_preferred_direction():
    drawn = contexts.uniform(0, np.arange(4000), 8)
    np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(drawn.T @ drawn / len(drawn), np.eye(8) / 8, atol=0.015)


def test_fitted_contexts_follow_the_reference():
    random = np.random.default_rng(1)
    mean = np.array([3.0, 0, 0, 0])
    covariance = np.diag([0.04, 0.25, 0.01, 0.0])
    drawn = contexts.fitted(0, np.arange(4000), mean, covariance)
    expected = contexts.normalise(random.multivariate_normal(mean, covariance, 4000))
    np.testing.assert_allclose(drawn.mean(axis=0), expected.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(expected.T), atol=0.002)
    assert np.abs(drawn[:, 3]).max() < 1e-6  # no variance, no spread


def test_shrinkage_is_strong_for_few_identities_and_vanishes_for_many():
    few, some, many = (contexts.fit_identities(reference(count)).shrinkage for count in (5, 100, 20_000))
    assert 1 >= few > some > many >= 0
    assert many < 0.01
    distribution = contexts.fit_identities(reference(5))
    assert np.linalg.eigvalsh(distribution.covariance)[0] > 0  # 5 identities span 24 dimensions
    plain = np.cov(reference(5).T, bias=True)
    assert np.trace(distribution.covariance) == pytest.approx(np.trace(plain), rel=1e-6)


def test_a_stored_distribution_is_used_as_it_is(tmp_path):
    fit = contexts.fit_identities(reference())
    np.savez(tmp_path / "fit.npz", mean=fit.mean, covariance=fit.covariance)
    np.savez(tmp_path / "rows.npz", contexts=reference())
    numbers = np.arange(6)
    np.testing.assert_array_equal(
        contexts.SOURCES["fitted"](0, numbers, WIDTH, tmp_path / "fit.npz"),
        contexts.SOURCES["fitted"](0, numbers, WIDTH, tmp_path / "rows.npz"),
    )


def test_npz_round_trip_with_names(tmp_path):
    np.savez(tmp_path / "c.npz", contexts=reference(3), names=np.array(["a", "b", "ç"]))
    loaded = contexts.load_contexts(tmp_path / "c.npz")
    assert loaded.names == ("a", "b", "ç")
    np.testing.assert_array_equal(loaded.contexts, reference(3))


def test_published_file_is_a_torch_saved_dict(tmp_path):
    vectors = reference(4)
    torch.save({f"{row}.jpg": vector for row, vector in enumerate(vectors)}, tmp_path / "c.npy")
    loaded = contexts.load_contexts(tmp_path / "c.npy")
    assert loaded.names == ("0.jpg", "1.jpg", "2.jpg", "3.jpg")
    np.testing.assert_array_equal(loaded.contexts, vectors)


class Exploit:
    """Pickles to a call that leaves a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path, legacy):
    witness = tmp_path / "witness"
    payload = {"a": reference(1)[0], "b": Exploit(witness)}
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
    with pytest.raises(ContextsError, match=r"contexts file .*c.np"):
        contexts.load_contexts(tmp_path / name)


@pytest.mark.parametrize("name", ["c.npz", "c.npy"])
@pytest.mark.parametrize("read", [contexts.load_contexts, contexts.load_identities])
def test_damaged_files_say_so(tmp_path, name, read):
    path = tmp_path / name
    if name == "c.npz":
        np.savez(path, contexts=reference(4), mean=np.zeros(4), covariance=np.eye(4))
    else:
        torch.save({str(row): vector for row, vector in enumerate(reference(4))}, path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    overwritten = whole[:40] + bytes(middle - 40) + whole[middle:]
    for damaged in (whole[:middle], whole[:-1], whole[: middle // 8], overwritten):
        path.write_bytes(damaged)
        with pytest.raises(ContextsError, match=r"contexts file .*c.np"):
            read(path)


def test_missing_file_and_missing_array(tmp_path):
    with pytest.raises(ContextsError, match="does not exist"):
        contexts.load_contexts(tmp_path / "none.npz")
    np.savez(tmp_path / "c.npz", vectors=reference(3))
    with pytest.raises(ContextsError, match="contexts"):
        contexts.load_contexts(tmp_path / "c.npz")
    with pytest.raises(ContextsError, match="needs a file"):
        contexts.SOURCES["file"](0, np.arange(2), WIDTH, None)


def test_more_identities_than_the_file_holds(tmp_path):
    np.savez(tmp_path / "c.npz", contexts=reference(10))
    with pytest.raises(ContextsError, match="11 identities were asked for but only 10"):
        contexts.SOURCES["file"](0, np.array([3, 10]), WIDTH, tmp_path / "c.npz")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c[:, :-1], "width 24"),
        (lambda c: c[0], "width 24"),
        (lambda c: np.where(np.arange(len(c))[:, None] == 6, np.nan, c), "NaN or infinity in row 6"),
        (lambda c: np.where(np.arange(len(c))[:, None] >= 2, np.inf, c), "rows 2, 3, 4, 5, 6 and 33 more"),
        (lambda c: np.where(np.arange(len(c))[:, None] == 3, 0, c), "zero length in row 3"),
        (lambda c: c[np.r_[0:7, 2, 8:40]], r"row 7 \(row 7 equals row 2\)"),
    ],
)
def test_bad_contexts_are_named(spoil, message):
    with pytest.raises(ContextsError, match=message):
        contexts.check_contexts(spoil(reference()), WIDTH)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    asked=st.integers(1, 14),
)
def test_check_accepts_exactly_the_distinct_and_sufficient(rows, asked):
    chosen = reference()[rows]
    fine = len(set(rows)) == len(rows) and asked <= len(rows)
    if fine:
        contexts.check_contexts(chosen, WIDTH, asked)
    else:
        with pytest.raises(ContextsError):
            contexts.check_contexts(chosen, WIDTH, asked)


@pytest.mark.parametrize(
    "covariance", [np.eye(3), -np.eye(4), np.triu(np.ones((4, 4))), np.full((4, 4), np.nan)]
)
def test_impossible_covariances_are_refused(covariance):
    with pytest.raises(ContextsError, match="covariance"):
        contexts.fitted(0, np.arange(2), np.zeros(4), covariance)
