"""Verification sets whose figures are known: crops of one colour, and a network that sees colours alone."""

import io
import pickle

import numpy as np
from face_networks import save_linear
from PIL import Image


def crop(colour, size=112):
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), tuple(int(value) for value in colour)).save(buffer, "PNG")
    return buffer.getvalue()


def opposite(colour):
    """The colour to which a network of colours gives the opposite embedding."""
    return 255 - np.asarray(colour)


def colours(count, seed=0):
    """Colours far from grey, in which there is no direction."""
    return np.random.default_rng(seed).choice([20, 60, 200, 240], (count, 3))


def lfw_order(folds, each):
    """Which pairs are genuine in a list that stands in folds as that of LFW does."""
    return np.tile(np.repeat([True, False], each), folds)


def material(same, wrong=()):
    """Colours of pairs `(2P, 3)`: equal ones where `same`, else opposite; in `wrong` pairs the reverse."""
    alike = np.array(same) ^ np.isin(np.arange(len(same)), wrong)
    first = colours(len(same))
    second = np.where(alike[:, None], first, opposite(first))
    return np.stack([first, second], axis=1).reshape(-1, 3)


def save_bin(path, same, wrong=(), protocol=pickle.HIGHEST_PROTOCOL):
    """A `.bin` set of `material`."""
    images = [crop(colour) for colour in material(same, wrong)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps((images, [bool(one) for one in same]), protocol))
    return path


def save_colour_network(path, outputs=8, seed=0):
    """A recogniser in ONNX that gives opposite colours opposite embeddings."""
    save_linear(path, outputs, seed=seed)
    return path
