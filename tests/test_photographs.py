"""Verification sets of photographs: faces are found and aligned; where there is none, the middle is taken."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from verification_material import crop, lfw_order, save_bin

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.faces.align import TEMPLATE_112, align
from negfacediff_core.faces.detect import Faces
from negfacediff_core.recognition.crop_lists import aligned_photographs, encoded_crops
from negfacediff_core.recognition.embedding import check_size
from negfacediff_core.recognition.verification_sets import open_sets

# Where the faces of the photographs below stand: larger than the template by half, and off its place.
LANDMARKS = (1.5 * TEMPLATE_112 + np.array([40.0, 20.0])).astype(np.float32)


class Finder:
    """A detector that finds a face, and one in a corner, in every image that is not black."""

    def __init__(self):
        self.asked = 0

    def detect(self, images):
        self.asked += 1
        if not images.any():
            return [Faces(np.empty((0, 4)), np.empty(0), np.empty((0, 5, 2)))]
        boxes = np.array([[0, 0, 20, 20], [80, 60, 180, 180]], np.float32)
        return [Faces(boxes, np.array([0.9, 0.8]), np.stack([LANDMARKS / 9, LANDMARKS]))]


def photograph(seed, height=220, width=240):
    """Smooth noise: an image in which every shift can be told."""
    small = np.random.default_rng(seed).integers(1, 256, (9, 9, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_the_main_face_is_aligned_and_looked_for_once(tmp_path):
    pictures = [photograph(0), photograph(1, 300, 200)]
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    finder = Finder()
    crops = encoded_crops(paths, ["0", "1"], "lfw", finder)
    assert crops.side == 112 and finder.asked == 0
    for _ in range(2):
        for number, picture in enumerate(pictures):
            np.testing.assert_array_equal(crops.read(number), align(picture, LANDMARKS))
    assert finder.asked == 2 and not crops.faceless


@pytest.mark.parametrize(("height", "width"), [(224, 300), (300, 224)])
def test_without_a_face_the_middle_is_taken_and_counted(tmp_path, height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "none.png")
    Image.fromarray(photograph(0)).save(tmp_path / "one.png")
    crops = aligned_photographs(
        [tmp_path / "none.png", tmp_path / "one.png"], ["none", "one"], "lfw", Finder()
    )
    crops.read(1)
    assert crops.read(0).shape == (112, 112, 3) and crops.faceless == {0}


def test_the_middle_is_the_largest_square(tmp_path):
    """A detector that finds nothing: the crop is every other pixel's mean of the middle."""
    picture = photograph(2, 224, 300)
    Image.fromarray(picture).save(tmp_path / "one.png")
    blind = SimpleNamespace(detect=lambda images: Finder().detect(0 * images))
    read = aligned_photographs([tmp_path / "one.png"], ["one"], "lfw", blind).read(0)
    middle = picture[:, 38:262].reshape(112, 2, 112, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(read, middle, atol=1)


def test_photographs_are_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(photograph(3)).save(tmp_path / "turned.png", exif=exif)
    crops = aligned_photographs([tmp_path / "turned.png"], ["turned"], "lfw", Finder())
    np.testing.assert_array_equal(crops.read(0), align(np.rot90(photograph(3), -1), LANDMARKS))


def test_landmarks_that_no_face_has_are_no_face(tmp_path):
    Image.fromarray(photograph(4)).save(tmp_path / "one.png")
    faces = Faces(np.array([[0, 0, 9, 9.0]]), np.ones(1), np.full((1, 5, 2), 7.0))
    crops = aligned_photographs(
        [tmp_path / "one.png"], ["one"], "lfw", SimpleNamespace(detect=lambda images: [faces])
    )
    crops.read(0)
    assert crops.faceless == {0}


def test_crops_are_left_as_they_are(tmp_path):
    (aligned,) = open_sets([str(save_bin(tmp_path / "lfw.bin", lfw_order(10, 1)))], Finder())
    assert (aligned.crops.read(0) == aligned.crops.read(0)[0, 0]).all()
    assert not aligned.crops.faceless


def test_without_a_detector_photographs_are_refused_with_the_way_on():
    same = encoded_crops([crop((1, 2, 3), 250)] * 2, ["a", "b"], "lfw")
    takes_crops = SimpleNamespace(input_size=112, weights=SimpleNamespace(name="net.onnx"))
    with pytest.raises(
        NegFaceDiffError, match=r"250x250 pixels, and net\.onnx takes 112x112: .*--detector PACK"
    ):
        check_size(same, takes_crops, "LFW")
    with pytest.raises(NegFaceDiffError, match=r"b has 96x96 pixels.*--detector PACK"):
        encoded_crops([crop((1, 2, 3), 250), crop((1, 2, 3), 96)], ["a", "b"], "lfw")
