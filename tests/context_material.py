"""What context sources read, made tiny: a recogniser's pack, a generator with an empty context, pictures."""

import shutil

import numpy as np
import torch
import yaml
from PIL import Image


def save_pack(folder, tiny_pack):
    """A model pack with the tiny detector and the tiny judge, whose embeddings are as wide as contexts."""
    folder.mkdir(parents=True)
    shutil.copy(tiny_pack / "faces" / "detector.onnx", folder / "detector.onnx")
    shutil.copy(tiny_pack / "judge" / "judge.onnx", folder / "recogniser.onnx")
    return folder


def save_generator_with_empty_context(folder, tiny_pack, value=1.0):
    """The tiny generator, as if it had learned an empty context, of this value throughout."""
    shutil.copytree(tiny_pack / "generator", folder)
    config = folder / ".hydra" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["model"]["learn_empty_context"] = True
    config.write_text(yaml.safe_dump(content))
    checkpoint = folder / "checkpoints" / "ema_averaged_model.ckpt"
    state = torch.load(checkpoint, weights_only=True)
    width = content["model"]["context_channels"]
    state["eps_model.empty_context_embedding"] = torch.full((width,), float(value))
    torch.save(state, checkpoint)
    return folder


def picture(seed, face=True):
    """A dark 64-pixel image, with a bright spot, which the tiny detector takes for a face, or without."""
    random = np.random.default_rng(seed)
    image = random.integers(0, 80, (64, 64, 3), np.uint8)
    if face:
        image[16:48, 16:48] = random.integers(190, 256, (32, 32, 3), np.uint8)
    return image


def save_pictures(folder, seeds, suffix=".png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        Image.fromarray(picture(seed, **options)).save(folder / f"{seed:03}{suffix}")
    return folder
