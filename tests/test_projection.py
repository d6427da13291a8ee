"""Narrowing embeddings to the directions in which identities differ."""

import numpy as np
import pytest
import torch

from negfacediff_core.errors import ConfigError
from negfacediff_core.recognition.measure import held_out_figures
from negfacediff_core.recognition.projection import ProjectionSettings, fit_projection


def embeddings_of(identities, replicates=4, width=24, dimensions=6, seed=0):
    """Identities that differ in `dimensions` of `width` directions, unevenly, under noise in all of them."""
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(np.random.default_rng(99).standard_normal((width, width)))[0]
    spread = np.concatenate([np.linspace(4, 1, dimensions), np.zeros(width - dimensions)])
    centres = random.standard_normal((identities, 1, width)) * spread
    noise = 0.8 * random.standard_normal((identities, replicates, width))
    return ((centres + noise) @ axes.T + 3.0).astype(np.float32)


def narrowed(embeddings, **settings):
    projection = fit_projection(embeddings_of(400), ProjectionSettings(**settings))
    with torch.inference_mode():
        return projection(torch.from_numpy(embeddings)).numpy()


def test_identities_are_told_apart_as_well_in_fewer_dimensions():
    held_out = embeddings_of(80, seed=1)
    before = held_out_figures(held_out - held_out.mean((0, 1)))
    after = held_out_figures(narrowed(held_out, width=6))
    assert after["fdr"] > before["fdr"]
    assert after["eer"] <= before["eer"]


def test_evening_fills_the_dimensions_that_are_kept():
    held_out = embeddings_of(200, seed=1)
    ratios = [
        held_out_figures(narrowed(held_out, width=6, evening=evening))["participation_ratio"]
        for evening in (0.0, 0.5, 1.0)
    ]
    assert ratios == sorted(ratios)
    assert ratios[2] > 5.5


def test_narrowed_embeddings_of_the_training_identities_are_centred():
    training = embeddings_of(400)
    projection = fit_projection(training, ProjectionSettings(width=5))
    with torch.inference_mode():
        means = projection(torch.from_numpy(training)).mean((0, 1))
    assert torch.allclose(means, torch.zeros(5), atol=1e-4)


@pytest.mark.parametrize(("identities", "replicates", "width"), [(6, 4, 6), (40, 1, 6), (40, 4, 25)])
def test_what_cannot_be_narrowed_is_refused(identities, replicates, width):
    with pytest.raises(ConfigError, match=f"cannot be narrowed to {width}"):
        fit_projection(embeddings_of(identities, replicates), ProjectionSettings(width=width))
