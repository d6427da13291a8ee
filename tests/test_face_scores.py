"""Quality and attribute networks, and head pose: against what is known of tiny networks and turned heads."""

import numpy as np
import pytest
from face_networks import save_linear
from hypothesis import given
from hypothesis import strategies as st

from negfacediff_core.errors import NegFaceDiffError, WeightsError
from negfacediff_core.faces.align import TEMPLATE_112, align_batch
from negfacediff_core.faces.pose import HEAD, head_pose
from negfacediff_core.faces.quality import (
    attributes_of,
    genderage_crops,
    is_genderage,
    load_attributes,
    load_quality,
)


def crops(count, size=112):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def means(images):
    return (images.astype(np.float64).mean((1, 2)) - 127.5) / 127.5


@pytest.mark.parametrize("rank", [1, 2])
def test_quality_is_the_number_that_the_network_gives(rank, tmp_path):
    weights = save_linear(tmp_path / "quality.onnx", 1, rank=rank)
    scorer, images = load_quality(tmp_path / "quality.onnx"), crops(35)
    np.testing.assert_allclose(scorer.score(images), means(images) @ weights, atol=1e-5)
    assert scorer.score(images[:0]).shape == (0, 1)
    assert len(scorer.sha256) == 64


def test_attributes_are_the_class_of_the_highest_score(tmp_path):
    weights = save_linear(tmp_path / "classes.onnx", 4)
    scorer, images = load_attributes(tmp_path / "classes.onnx"), crops(20)
    found = attributes_of(scorer, images)
    np.testing.assert_array_equal(found.attribute, (means(images) @ weights).argmax(axis=1))
    assert found.age is None and not is_genderage(scorer)


def test_genderage_takes_raw_pixels_and_gives_years(tmp_path):
    weights = save_linear(tmp_path / "genderage.onnx", 3, size=96)
    scorer, images = load_attributes(tmp_path / "genderage.onnx"), crops(5, 96)
    found, expected = attributes_of(scorer, images), images.astype(np.float64).mean((1, 2)) @ weights
    assert is_genderage(scorer)
    np.testing.assert_array_equal(found.attribute, expected[:, :2].argmax(axis=1))
    np.testing.assert_allclose(found.age, 100 * expected[:, 2], rtol=1e-4)


def test_what_genderage_sees_is_wider_than_a_crop_and_in_its_middle():
    image = np.zeros((1, 200, 200, 3), np.uint8)
    points = TEMPLATE_112 + 40.0
    centres = np.round(points).astype(int)
    for x, y in centres:
        image[0, y - 2 : y + 3, x - 2 : x + 3] = 255
    wide, narrow = genderage_crops(image, points[None]), align_batch(image, points[None], 96)
    assert wide.shape == (1, 96, 96, 3)

    def extent(crop):
        lit = np.argwhere(crop[0, :, :, 0] > 60)
        return np.ptp(lit, axis=0)

    assert (extent(wide) < 0.75 * extent(narrow)).all()
    assert np.abs(np.argwhere(wide[0, :, :, 0] > 60).mean(0) - 48).max() < 8


@pytest.mark.parametrize(
    ("load", "made", "said"),
    [
        (
            load_quality,
            {"outputs": 2},
            "gives 2 numbers for a crop of 112 pixels; a quality network gives one",
        ),
        (load_quality, {"outputs": 1, "size": 96}, "gives 1 numbers for a crop of 96 pixels"),
        (load_quality, {"outputs": 1, "size": 224}, "takes images of 224x224"),
        (load_quality, {"outputs": 1, "count": 2}, "has 2 outputs"),
        (load_attributes, {"outputs": 1}, "an attribute network gives one a class, at least two"),
        (load_attributes, {"outputs": 4, "size": 96}, "female, male and age for one of 96"),
    ],
)
def test_networks_of_another_form_are_refused(load, made, said, tmp_path):
    save_linear(tmp_path / "network.onnx", **made)
    with pytest.raises(WeightsError, match=said):
        load(tmp_path / "network.onnx")


def test_files_and_crops_that_are_none(tmp_path):
    with pytest.raises(WeightsError, match=r"no file .*: give one ONNX file"):
        load_quality(tmp_path)
    (tmp_path / "text.onnx").write_bytes(b"not a network")
    with pytest.raises(WeightsError, match=r"text.onnx .*network|readable ONNX"):
        load_quality(tmp_path / "text.onnx")
    save_linear(tmp_path / "quality.onnx", 1)
    with pytest.raises(NegFaceDiffError, match=r"uint8 RGB of shape \(N, 112, 112, 3\)"):
        load_quality(tmp_path / "quality.onnx").score(crops(2, 96))


def turned(yaw, pitch, roll):
    """The landmarks of the mean head turned by angles in degrees, as a far camera sees them."""
    y, p, r = np.radians([yaw, pitch, roll])
    about_x = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    about_y = np.array([[np.cos(y), 0, -np.sin(y)], [0, 1, 0], [np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    return (HEAD @ (about_y @ about_x @ about_z).T)[:, :2]


angles = st.floats(-60, 60)


@given(yaw=angles, pitch=angles, scale=st.floats(0.1, 50), shift=st.floats(-200, 200))
def test_the_pose_of_a_turned_head_is_found(yaw, pitch, scale, shift):
    found = head_pose(scale * turned(yaw, pitch, 0) + shift)
    assert (found.yaw, found.pitch) == (pytest.approx(yaw, abs=1e-3), pytest.approx(pitch, abs=1e-3))


@given(roll=st.floats(-170, 170))
def test_roll_is_the_tilt_of_the_eyes_in_the_image(roll):
    assert head_pose(turned(0, 0, roll)).roll == pytest.approx(roll, abs=1e-3)


def test_the_template_looks_straight_ahead_and_signs_are_as_stated():
    assert np.abs(head_pose(TEMPLATE_112)).max() < 0.5
    moved = TEMPLATE_112.copy()
    moved[2] += (5, 0)
    assert head_pose(moved).yaw > 5
    moved[2] = TEMPLATE_112[2] - (0, 5)
    assert head_pose(moved).pitch > 5
    moved = TEMPLATE_112 + np.array([[0, -2], [0, 2], [0, 0], [0, -2], [0, 2]])
    assert head_pose(moved).roll > 2


def test_points_that_are_no_face_have_no_pose():
    line = np.stack([np.arange(5.0), np.arange(5.0)], axis=1)
    faces = np.stack([TEMPLATE_112, np.full((5, 2), np.nan), np.ones((5, 2)), line])
    found = np.stack(head_pose(faces.reshape(2, 2, 5, 2)))
    np.testing.assert_array_equal(np.isnan(found), np.tile([[[False, True], [True, True]]], (3, 1, 1)))
