"""The weights that ship: insightface reads the model packs, the project's loaders read all of it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from insightface.app import FaceAnalysis

from negfacediff_core.contexts import load_contexts
from negfacediff_core.diffusion.checkpoint import load_generator
from negfacediff_core.diffusion.release_config import read_config
from negfacediff_core.faces.align import align
from negfacediff_core.faces.detect import load_detector
from negfacediff_core.faces.embed import load_embedder
from negfacediff_core.renders.identity import draw_identity
from negfacediff_core.renders.render import render

PACK = Path(__file__).parents[1] / "packs" / "demo"
HELD_OUT = 1_000_000


@pytest.fixture(scope="module")
def faces():
    return [
        render(draw_identity(0, HELD_OUT + i), replicate, 128) for i in range(3) for replicate in range(2)
    ]


def test_it_is_small():
    assert sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file()) < 20e6


@pytest.mark.filterwarnings("ignore:`estimate` is deprecated:FutureWarning")  # insightface's own alignment
def test_insightface_finds_and_embeds_faces_as_the_project_does(faces):
    analysis = FaceAnalysis(name=str(PACK / "faces"), providers=["CPUExecutionProvider"])
    analysis.prepare(ctx_id=-1, det_thresh=0.5, det_size=(128, 128))
    found = load_detector(PACK / "faces").detect(np.stack([face.image for face in faces]))
    embedder = load_embedder(PACK / "faces")
    for face, ours in zip(faces, found, strict=True):
        (theirs,) = analysis.get(face.image[..., ::-1])
        np.testing.assert_allclose(ours.landmarks[0], theirs.kps, atol=0.1)
        eyes = np.linalg.norm(face.landmarks[0] - face.landmarks[1])
        assert np.abs(ours.landmarks[0] - face.landmarks).mean() < 0.2 * eyes
        crop = align(face.image, ours.landmarks[0])
        (mine,) = embedder.embed(crop[None])
        cosine = mine @ theirs.embedding / np.linalg.norm(mine) / np.linalg.norm(theirs.embedding)
        # insightface interpolates the crop in steps of 1/32 pixel
        assert cosine > 0.98


def test_the_generator_takes_the_recognisers_embeddings_and_the_judge_is_another():
    generator = load_generator(PACK / "generator")
    recogniser, judge = load_embedder(PACK / "faces"), load_embedder(PACK / "judge")
    assert generator.context_width == recogniser.width
    assert generator.image_size == 64
    assert read_config(PACK / "generator")["constants"]["conditioner_sha256"] == recogniser.sha256
    assert judge.sha256 != recogniser.sha256
    contexts = load_contexts(PACK / "contexts" / "heldout.npz").contexts
    assert contexts.shape == (300, recogniser.width)


def test_running_its_networks_leaves_nothing_in_the_home(tmp_path):
    code = (
        "import sys, numpy as np; from negfacediff_core.faces.embed import load_embedder\n"
        "load_embedder(sys.argv[1]).embed(np.zeros((1, 112, 112, 3), np.uint8))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, str(PACK / "judge")], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
