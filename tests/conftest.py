"""Shared fixtures: tiny random weights in the layouts of real ones, and a small build of them."""

import os
import shutil
import tempfile
import warnings

import pytest
import torch
from diffusion_reference import TINY_MODEL, save_tiny
from hypothesis import settings
from torch import Tensor, nn

from negfacediff_core.config import BuildConfig
from negfacediff_core.diffusion.checkpoint import save_generator
from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder, VQEncoder
from negfacediff_core.diffusion.unet import ConditionalUNet

# What this machine's user has told Prefect, and whether the home can be written, is not what is tested.
# Prefect reads it when it is first imported.
_PREFECT_HOME = tempfile.TemporaryDirectory(prefix="negfacediff-tests-")
os.environ["PREFECT_HOME"] = _PREFECT_HOME.name
# A busy machine is no reason to fail: how long one example takes is nobody's promise.
settings.register_profile("negfacediff", deadline=None)
settings.load_profile("negfacediff")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Every test begins with one thread, whatever the machine has and the test before it has set."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_fsync():
    """Tests end before the power fails; without this they wait for the disk most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


class BrightSpots(nn.Module):
    """A detector in SCRFD's form that takes bright squares for faces: in some images, not in all."""

    def forward(self, frames: Tensor) -> list[Tensor]:
        scores, boxes, landmarks = [], [], []
        # Five points as in a face, in strides from the anchor.
        face = torch.tensor([-1.0, -1.0, 1.0, -1.0, 0.0, 0.2, -0.8, 1.2, 0.8, 1.2])
        for stride in (8, 16, 32):
            light = nn.functional.avg_pool2d(frames.mean(1, keepdim=True), stride)
            anchors = light.flatten(1)[:, :, None].repeat_interleave(2, 1)
            scores.append(torch.sigmoid(8 * (anchors - SPOT)))
            boxes.append(2.0 + 0 * anchors.expand(-1, -1, 4))
            landmarks.append(face + 0.3 * anchors.expand(-1, -1, 10))
        return scores + boxes + landmarks


# Brightness, in [-1, 1], at which a square counts as a face.
SPOT = 0.36


def save_tiny_generator(folder, T):
    """Save a tiny random generator of 32-pixel images, with contexts of width 16 and T timesteps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first_stage = FirstStageSettings(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=64)
        unet, decoder, encoder = ConditionalUNet(**TINY_MODEL), VQDecoder(first_stage), VQEncoder(first_stage)
        for weights in unet.parameters():
            if not weights.any():  # the last layer starts at zero: an untrained network would see no context
                nn.init.normal_(weights, std=0.1)
    diffusion = {"T": T, "schedule_type": "linear"}
    save_generator(folder, unet, decoder, encoder, model=TINY_MODEL, diffusion=diffusion, image_size=32)


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory):
    """A folder with `generator` (32-pixel images), `faces` (a detector) and `judge`, all tiny."""
    folder = tmp_path_factory.mktemp("tiny_pack")
    save_tiny_generator(folder / "generator", T=50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pool = (nn.Conv2d(3, 8, 7, 4), nn.ReLU(), nn.AvgPool2d(9), nn.Flatten(), nn.Linear(72, 16))
        judge = nn.Sequential(*pool)
    _export(BrightSpots(), folder / "faces" / "detector.onnx", 128)
    _export(judge, folder / "judge" / "judge.onnx", 112)
    (folder / "LICENSE").write_text("CC0 1.0: random numbers\n")  # whose terms nobody need accept
    return folder


def _export(network, path, size):
    path.parent.mkdir()
    with warnings.catch_warnings():
        # The tracer of the pinned torch is deprecated; its successor needs one package more.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 3, size, size),),
            path,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            dynamo=False,
        )


@pytest.fixture(scope="session")
def tiny_generator(tiny_pack):
    """The folder of a tiny random generator, with contexts of width 16 and 50 timesteps."""
    return tiny_pack / "generator"


@pytest.fixture(scope="session")
def tiny_build(tiny_pack):
    """A build of 5 identities x 3 images in units of 2 x 2, with the tiny weights."""
    return BuildConfig.model_validate(
        {
            "name": "tiny",
            "identities": 5,
            "images": 3,
            "block_identities": 2,
            "block_images": 2,
            "samples": {"generator": str(tiny_pack / "generator"), "steps": 2},
            "aligned": {"detector": str(tiny_pack / "faces")},
            "embeddings": {"judge": str(tiny_pack / "judge")},
            "evaluation": {"bootstrap": 10},
        }
    )


@pytest.fixture(scope="session")
def prefect_server():
    """A Prefect server with an empty database, shared by all tests of one process: a start takes 10 s."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):
        yield


@pytest.fixture(scope="session")
def tiny_store(tiny_build, tmp_path_factory):
    """A store with the tiny build as the run `tiny`, whole but for its pictures; tests read or copy it."""
    from stage_builds import make

    store = tmp_path_factory.mktemp("tiny_store") / "store"
    make(tiny_build, store)
    return store


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A saved release of tiny random networks, which tests only read: its folder, and the networks."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, *save_tiny(folder)


@pytest.fixture
def release(saved, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(saved[0], tmp_path / "release")
