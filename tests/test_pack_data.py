"""What the demo pack is made from: contexts and latents that are made once, context sources, render sets."""

import numpy as np
import pytest
import torch

from flows.pack import NetworkName
from flows.pack_card import NETWORKS
from flows.pack_data import RENDER_SETS, prepare_contexts, prepare_latents, write_context_sources
from flows.pack_training import TRAININGS
from negfacediff_core.contexts import fitted, load_contexts, load_identities
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQEncoder
from negfacediff_core.diffusion.training import seeded
from negfacediff_core.diffusion.training_set import embed_images

LANDMARKS = np.array([[5.5, 7.4], [10.5, 7.4], [8.0, 10.2], [5.9, 13.2], [10.1, 13.2]], np.float32)


@pytest.fixture(scope="module")
def images():
    """Six "identities" with four images of 16 pixels."""
    return np.random.default_rng(0).integers(0, 256, (6, 4, 16, 16, 3), np.uint8)


class CountingEmbedder:
    """Means of colour over a 4x4 grid as "embeddings"; counts the crops that it saw."""

    sha256, input_size, width = "0" * 64, 112, 48

    def __init__(self):
        self.seen = 0

    def embed(self, crops, flip=False):
        self.seen += len(crops)
        return (
            crops.reshape(len(crops), 4, 28, 4, 28, 3).mean((2, 4)).reshape(len(crops), -1).astype("f4") + 1
        )


def test_contexts_are_made_once(images, tmp_path):
    landmarks = np.broadcast_to(LANDMARKS, (6, 4, 5, 2))
    embedder = CountingEmbedder()
    made, read = (prepare_contexts(images, landmarks, embedder, tmp_path) for _ in range(2))
    assert embedder.seen == 24
    np.testing.assert_array_equal(made, read)
    np.testing.assert_allclose(np.linalg.norm(made, axis=2), 1, atol=1e-6)


def test_latents_are_made_anew_for_other_weights(images, tmp_path):
    with seeded(0, 0):
        encoder = VQEncoder(FirstStageSettings(ch=32, ch_mult=(1, 1), num_res_blocks=0, n_embed=32)).eval()
    made, read = (prepare_latents(images, encoder, tmp_path) for _ in range(2))
    assert torch.equal(made, read)
    assert made.shape == (6, 4, 2, 3, 8, 8)
    with torch.no_grad():
        encoder.quant_conv.bias.add_(1)
    torch.testing.assert_close(prepare_latents(images, encoder, tmp_path), made + 1, atol=0.05, rtol=0)


def test_context_sources_load_and_draw(images, tmp_path):
    embeddings = embed_images(CountingEmbedder(), images, np.broadcast_to(LANDMARKS, (6, 4, 5, 2)))
    facts = write_context_sources(tmp_path, embeddings, np.arange(50, 56), embeddings)
    held_out = load_contexts(tmp_path / "heldout.npz")
    assert held_out.names == tuple(f"render-{number}" for number in range(50, 56))
    np.testing.assert_allclose(np.linalg.norm(held_out.contexts, axis=1), 1, atol=1e-6)
    reference = load_identities(tmp_path / "reference.npz")
    assert reference.shrinkage == pytest.approx(facts["shrinkage"])
    drawn = fitted(0, np.arange(3), reference.mean, reference.covariance)
    assert drawn.shape == (3, 48)


def test_render_sets_share_no_identity():
    ranges = [settings.identities for settings in RENDER_SETS.values()]
    assert sum(map(len, ranges)) == len(set().union(*ranges))


def test_every_network_of_the_command_and_of_the_card_can_be_trained():
    assert list(TRAININGS) == [name.value for name in NetworkName] == list(NETWORKS)
