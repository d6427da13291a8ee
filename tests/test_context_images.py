"""Contexts that are embeddings of images: which images count, and what an image without a face does."""

from pathlib import Path

import numpy as np
import pytest
from context_material import picture, save_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from negfacediff_core import contexts
from negfacediff_core.contexts.images import TRIES, read_image
from negfacediff_core.errors import ContextsError

WIDTH = 12


def embed(images):
    """Colours of the four columns of an image that shows a bright spot."""
    dark = images.max(axis=(1, 2, 3)) < 100
    means = images.reshape(len(images), 64, 4, 16, 3).mean(axis=(1, 3)).reshape(len(images), WIDTH)
    return np.where(dark[:, None], np.nan, means).astype(np.float32)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_one_image_an_identity_in_the_order_of_names(tmp_path):
    save_pictures(tmp_path, [3, 1, 2])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image either")
    folder = contexts.list_images(tmp_path)
    assert folder.names == ("001.png", "002.png", "003.png")
    expected = unit(embed(np.array([picture(seed) for seed in (1, 2, 3)])))
    np.testing.assert_allclose(contexts.from_folder(np.arange(3), folder, embed), expected, atol=1e-6)
    one = contexts.from_folder(np.array([2]), folder, embed)
    np.testing.assert_allclose(one, expected[2:], atol=1e-6)


def test_a_folder_an_identity_is_the_mean_of_its_faces(tmp_path):
    save_pictures(tmp_path / "b", [4])
    save_pictures(tmp_path / "a", [0, 1])
    save_pictures(tmp_path / "a", [2], face=False)
    folder = contexts.list_images(tmp_path)
    assert folder.names == ("a", "b")
    assert [path.name for path in folder.images[0]] == ["000.png", "001.png", "002.png"]
    found = contexts.from_folder(np.arange(2), folder, embed)
    faces = unit(embed(np.array([picture(seed) for seed in (0, 1)])))
    np.testing.assert_allclose(found[0], unit(faces.mean(axis=0)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_images_are_read_upright_and_in_colour(tmp_path):
    pixels = picture(0)[:40]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), pixels[..., :1].repeat(3, axis=2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder.mkdir(exist_ok=True), "holds no images"),
        (lambda folder: (folder / "a.txt").write_text("x"), "holds no images"),
        (
            lambda folder: save_pictures(save_pictures(folder, [0]) / "sub", [1]),
            "holds both images .*000.png",
        ),
        (lambda folder: [(folder / name).mkdir() for name in "abcde"], "hold no images: .* and 2 more"),
    ],
)
def test_folders_that_hold_no_identities_are_refused(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ContextsError, match=message):
        contexts.list_images(tmp_path)


def test_identities_without_a_face_are_named(tmp_path):
    save_pictures(tmp_path, [0])
    save_pictures(tmp_path, range(1, 6), face=False)
    folder = contexts.list_images(tmp_path)
    message = r"5 identities show no face .*001\.png, .*002\.png, .*003\.png and 2 more; take them out"
    with pytest.raises(ContextsError, match=message):
        contexts.from_folder(np.arange(6), folder, embed)
    contexts.from_folder(np.arange(1), folder, embed)


@pytest.mark.parametrize("content", [b"", b"just text", None])
def test_unreadable_images_are_named(content, tmp_path):
    save_pictures(tmp_path, range(3))
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert read_image(tmp_path / "001.png") is None
    with pytest.raises(ContextsError, match=r"1 images cannot be read: .*001\.png; mend"):
        contexts.from_folder(np.arange(3), contexts.list_images(tmp_path), embed)


class Maker:
    """Makes an image of each (identity, replicate), with a face in some; counts what it is asked for."""

    def __init__(self, share):
        self.share = share
        self.asked = []

    def face(self, identity, replicate):
        return np.random.default_rng([9, identity, replicate]).random() < self.share

    def __call__(self, identities, replicates, seed):
        self.asked += [(int(i), int(r)) for i, r in zip(identities, replicates, strict=True)]
        self.seed = seed
        rows = zip(identities, replicates, strict=True)
        return np.array([picture([seed, i, r], face=self.face(i, r)) for i, r in rows])


@settings(max_examples=10)
@given(seed=st.integers(0, 2**63 - 1), order=st.permutations(range(8)))
def test_two_stage_is_a_function_of_seed_and_identity(seed, order):
    maker = Maker(0.6)
    whole = contexts.two_stage(seed, np.arange(8), maker, embed)
    part = contexts.two_stage(seed, np.array(order[:5]), maker, embed)
    np.testing.assert_array_equal(part, whole[order[:5]])
    expected = []
    for identity in range(8):
        attempt = next(attempt for attempt in range(TRIES) if maker.face(identity, attempt))
        expected.append(unit(embed(picture([maker.seed, identity, attempt])[None])[0]))
    np.testing.assert_allclose(whole, expected, atol=1e-6)


def test_two_stage_takes_no_images_of_the_dataset_and_tries_no_face_twice():
    maker = Maker(0.5)
    contexts.two_stage(0, np.arange(40), maker, embed)
    assert maker.seed not in (0, 1) and 0 <= maker.seed < 2**63
    assert len(set(maker.asked)) == len(maker.asked)
    later = Maker(0.5)
    contexts.two_stage(0, np.arange(40), later, embed, np.ones(40, np.int64))
    assert not set(maker.asked) & set(later.asked)


def test_a_generator_that_makes_no_faces_is_given_up():
    maker = Maker(0.0)
    with pytest.raises(
        ContextsError, match=r"no face for 3 of 3 identities in 16 images each .*identity 4\)"
    ):
        contexts.two_stage(0, np.array([4, 5, 6]), maker, embed)
    assert len(maker.asked) == 3 * TRIES


def test_paths_are_named_without_their_long_beginnings(tmp_path):
    folder = contexts.list_images(save_pictures(tmp_path / "photos", [0], face=False))
    with pytest.raises(ContextsError) as raised:
        contexts.from_folder(np.arange(1), folder, embed)
    assert str(Path("photos", "000.png")) in str(raised.value) and str(tmp_path) not in str(raised.value)
