"""Contexts: drawn per identity, each source alike, and checked with the rows named."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from negfacediff_core import contexts
from negfacediff_core.errors import ContextsError

WIDTH = 24
IDENTITIES = 33


def reference(count=40, width=WIDTH, seed=0):
    """Identities that spread mostly over a few directions, around a mean that is not zero."""
    random = np.random.default_rng(seed)
    spread = np.geomspace(1, 0.05, width)
    return contexts.normalise(random.standard_normal((count, width)) * spread + 0.3)


def embed(images):
    """The mean colours of the 8 columns of an image; none where its first pixel is bright."""
    embeddings = images.reshape(len(images), -1, 8, 3).mean(axis=1).reshape(len(images), WIDTH)
    return np.where(images[:, 0, 0, :1] > 200, np.nan, embeddings).astype(np.float32)


def generate(identities, replicates, seed):
    """Noise for images: a function of the three numbers alone."""
    drawn = [
        np.random.default_rng([seed, identity, replicate]).integers(0, 256, (8, 8, 3), np.uint8)
        for identity, replicate in zip(identities, replicates, strict=True)
    ]
    return np.array(drawn)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What every source can draw from."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number:02}.npy" for number in range(IDENTITIES)]
    return contexts.Given(
        width=WIDTH,
        reference=reference(),
        distribution=contexts.fit_identities(reference()),
        folder=contexts.ImageFolder(tuple(path.stem for path in paths), tuple((path,) for path in paths)),
        generate=generate,
        embed=embed,
        count=IDENTITIES,
        steps=5,
    )


@pytest.fixture(autouse=True)
def images_on_disk(monkeypatch):
    """Pictures whose file names are their seeds; reading real ones is tested elsewhere."""

    def read(path):
        image = np.random.default_rng(int(Path(path).stem)).integers(0, 256, (8, 8, 3), np.uint8)
        image[0, 0] = 0
        return image

    monkeypatch.setattr("negfacediff_core.contexts.images.read_image", read)


def draw(source, seed, identities, material, attempt=0):
    identities = np.asarray(identities)
    return contexts.SOURCES[source](seed, identities, np.full_like(identities, attempt), material)


@pytest.mark.parametrize("source", contexts.SOURCES)
def test_every_source_gives_unit_vectors_that_stay_when_identities_are_added(source, material):
    few = draw(source, 3, range(5), material)
    many = draw(source, 3, range(IDENTITIES), material)
    assert few.dtype == np.float32 and few.shape == (5, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(few, many[:5])
    np.testing.assert_array_equal(draw(source, 3, [30, 2, 7], material), many[[30, 2, 7]])
    contexts.check_contexts(many, WIDTH, identities=IDENTITIES)


@pytest.mark.parametrize("source", sorted(set(contexts.SOURCES) - {"file", "folder"}))
def test_another_seed_gives_other_contexts(source, material):
    one, other = (draw(source, seed, range(4), material) for seed in (0, 1))
    assert (np.abs(one - other).max(axis=1) > 1e-2).all()


@pytest.mark.parametrize("source", contexts.SOURCES)
def test_another_attempt_gives_another_context_where_the_table_says_so(source, material):
    first, second = (draw(source, 0, range(4), material, attempt) for attempt in (0, 1))
    moved = np.abs(first - second).max(axis=1) > 1e-2
    assert (moved == (source in contexts.REDRAWN)).all()


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


@settings(max_examples=30, deadline=None)
@given(margin=st.floats(0, 0.5), seed=st.integers(0, 2**63 - 1))
def test_mixup_lies_between_two_known_identities(margin, seed):
    known = np.eye(6, dtype=np.float32)
    mixed = contexts.mixup(seed, np.arange(200), known, margin)
    assert ((mixed > 0).sum(axis=1) <= 2).all()
    shares = mixed / mixed.sum(axis=1, keepdims=True)
    low = np.where(shares > 0, shares, 1).min(axis=1)
    assert (low >= margin - 1e-6).all()
    assert (shares.max(axis=1) <= 1 - margin + 1e-6).all()


def test_mixup_takes_every_pair_and_every_share():
    known = np.eye(5, dtype=np.float32)
    mixed = contexts.mixup(0, np.arange(4000), known, 0.25)
    shares = mixed / mixed.sum(axis=1, keepdims=True)
    pairs, counts = np.unique(mixed > 0, axis=0, return_counts=True)
    assert len(pairs) == 10 and counts.min() > 400 - 5 * 20
    largest = shares.max(axis=1)
    np.testing.assert_allclose(np.quantile(largest, [0.1, 0.5, 0.9]), [0.525, 0.625, 0.725], atol=0.01)


def test_mixup_of_one_identity_is_refused():
    with pytest.raises(ContextsError, match="at least two reference identities, got 1"):
        contexts.mixup(0, np.arange(3), reference(1), 0.25)


def test_a_distribution_of_another_width_is_refused(material):
    narrow = contexts.Given(width=WIDTH - 1, distribution=material.distribution)
    with pytest.raises(ContextsError, match="width 24, but the generator takes contexts of width 23"):
        draw("fitted", 0, range(2), narrow)


def test_more_identities_than_the_file_holds(material):
    with pytest.raises(ContextsError, match="41 identities were asked for but only 40"):
        draw("file", 0, [3, 40], material)


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
