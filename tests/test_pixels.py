"""Decoding of crops: the same pixels as Pillow's, whatever the form of the image."""

import io

import numpy as np
import pytest
from PIL import Image

from negfacediff_core.errors import DamagedError
from negfacediff_core.export.images import encode_jpeg
from negfacediff_core.recognition.datasets import decode
from negfacediff_core.recognition.pixels import decode_rgb


def picture(mode="RGB"):
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((112, 112), Image.Resampling.BICUBIC).convert(mode)


def encoded(mode, form, **options):
    file = io.BytesIO()
    picture(mode).save(file, form, **options)
    return file.getvalue()


def by_pillow(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize(
    "content",
    [
        encoded("RGB", "JPEG", quality=95, subsampling=0),
        encoded("RGB", "JPEG", quality=60),  # half of the colour
        encoded("RGB", "JPEG", progressive=True),
        encoded("L", "JPEG"),
        encoded("CMYK", "JPEG"),
        encoded("RGB", "PNG"),
        encoded("RGBA", "PNG"),
        encoded("RGB", "WEBP", lossless=True),
        encode_jpeg(np.asarray(picture()), 95),
    ],
    ids=["4:4:4", "4:2:0", "progressive", "grey", "cmyk", "png", "alpha", "webp", "exported"],
)
def test_pixels_are_those_of_pillow(content):
    found = decode_rgb(content)
    assert found.shape == (112, 112, 3) and found.dtype == np.uint8
    assert np.array_equal(found, by_pillow(content))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", encoded("RGB", "JPEG")[:400], b"no image"])
def test_what_is_no_image_is_damaged(content):
    with pytest.raises(DamagedError, match=r"0001\.jpg is no image that can be read"):
        decode(content, "0001.jpg")


def test_an_exported_jpeg_is_as_near_as_its_quality_says():
    pixels = np.asarray(picture())
    errors = {
        quality: np.abs(by_pillow(encode_jpeg(pixels, quality)).astype(int) - pixels).mean()
        for quality in (30, 95)
    }
    assert errors[95] < 1.5 < errors[30]
    assert len(encode_jpeg(pixels, 30)) < len(encode_jpeg(pixels, 95))
