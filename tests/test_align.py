"""Five-point alignment: reference outputs, exact recovery of similarities, batch equal to single."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.faces.align import (
    TEMPLATE_96_LEGACY,
    TEMPLATE_112,
    align,
    align_batch,
    similarity_transform,
    warp,
)

REFERENCE = Path(__file__).parent / "data" / "alignment.npz"
TEMPLATES = {"train": TEMPLATE_96_LEGACY, "eval": TEMPLATE_112}


@pytest.mark.parametrize("image", ["img128", "img250"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_matrix_equals_the_reference(image, template):
    with np.load(REFERENCE) as reference:
        matrix = similarity_transform(reference[f"{image}/landmarks"], TEMPLATES[template])
        np.testing.assert_allclose(matrix, reference[f"{image}/M_{template}"], atol=1e-5)


@pytest.mark.parametrize(("image", "template"), [("img128", "train"), ("img128", "eval"), ("img250", "eval")])
def test_crop_equals_exact_bilinear_interpolation(image, template):
    with np.load(REFERENCE) as reference:
        crop = warp(reference[f"{image}/image"], reference[f"{image}/M_{template}"])
        exact = reference[f"{image}/crop_{template}_exact_bilinear_f32"]
    assert crop.dtype == np.uint8
    # Half a grey level is the rounding to uint8; the float32 coordinates may tip a tie.
    assert np.abs(crop.astype(np.float64) - exact).max() <= 0.501


@given(
    scale=st.floats(0.02, 50),
    angle=st.floats(-np.pi, np.pi),
    shift=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)),
)
def test_recovers_any_similarity_exactly(scale, angle, shift):
    truth = np.array(
        [
            [scale * np.cos(angle), -scale * np.sin(angle), shift[0]],
            [scale * np.sin(angle), scale * np.cos(angle), shift[1]],
        ]
    )
    landmarks = TEMPLATE_112[::-1] * [1.0, 0.5]  # any five points: the fit knows no faces
    targets = landmarks @ truth[:, :2].T + truth[:, 2]
    found = similarity_transform(landmarks, targets)
    np.testing.assert_allclose(found, truth, atol=1e-9 * max(1.0, *np.abs(truth).ravel()))


def test_a_mirrored_face_is_turned_but_never_reflected():
    mirrored = TEMPLATE_112 * [-1.0, 1.0]
    matrix = similarity_transform(mirrored)
    assert np.linalg.det(matrix[:, :2]) > 0


def test_batch_equals_single_and_is_independent_of_its_neighbours():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (7, 64, 64, 3), np.uint8)
    landmarks = TEMPLATE_112 * (64 / 112) + random.normal(0, 1.5, (7, 5, 2))
    batch = align_batch(images, landmarks)
    assert batch.shape == (7, 112, 112, 3)
    for image, points, crop in zip(images, landmarks, batch, strict=True):
        np.testing.assert_array_equal(align(image, points), crop)
    np.testing.assert_array_equal(align_batch(images[::-1], landmarks[::-1]), batch[::-1])


def test_the_identity_copies_pixels_and_outside_is_black():
    image = np.random.default_rng(1).integers(1, 256, (20, 30, 3), np.uint8)
    crop = warp(image, np.eye(2, 3), 40)
    np.testing.assert_array_equal(crop[:20, :30], image)
    assert not crop[20:].any() and not crop[:, 30:].any()


def test_size_scales_the_template():
    image = np.random.default_rng(2).integers(0, 256, (56, 56, 3), np.uint8)
    np.testing.assert_array_equal(align(image, TEMPLATE_112 / 2, size=56), image)


@pytest.mark.parametrize(
    ("landmarks", "words"),
    [
        (np.ones((5, 2)), "coincide"),
        (np.full((5, 2), np.nan), "not finite"),
        (np.ones((4, 2)), r"\(4, 2\)"),
    ],
)
def test_degenerate_landmarks_are_refused(landmarks, words):
    with pytest.raises(NegFaceDiffError, match=words):
        similarity_transform(landmarks)


def test_the_error_names_the_first_bad_face():
    landmarks = np.stack([TEMPLATE_112, TEMPLATE_112, np.zeros((5, 2))])
    with pytest.raises(NegFaceDiffError, match="face 2"):
        similarity_transform(landmarks)
