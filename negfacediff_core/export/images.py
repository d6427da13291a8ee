"""Images as PNG or JPEG bytes that say of themselves that a trained network made them.

Every image carries the same XMP packet with IPTC's DigitalSourceType `trainedAlgorithmicMedia`, as image
editors, search engines and provenance tools read it: `APP1` in a JPEG, an `iTXt` chunk in a PNG.
"""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

DIGITAL_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
# Level 6, zlib's default, takes three times as long as this for a sixth fewer bytes.
PNG_LEVEL = 1
# The ending of files of an encoding.
SUFFIXES = {"png": "png", "jpeg": "jpg"}


def encode_png(image: NDArray[np.uint8], quality: int) -> bytes:
    """Encode `(H, W, 3)` RGB as PNG, which loses nothing; `quality` is JPEG's alone."""
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", XMP)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=PNG_LEVEL, pnginfo=notes)
    return file.getvalue()


def encode_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """Encode `(H, W, 3)` RGB as JPEG of a `quality` in 1 .. 100, with all of its colour (4:4:4)."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0, xmp=XMP.encode())
    return file.getvalue()


ENCODERS: dict[str, Callable[[NDArray[np.uint8], int], bytes]] = {"png": encode_png, "jpeg": encode_jpeg}
