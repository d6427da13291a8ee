"""Verification sets in insightface's `.bin` form: a pickle of 2N encoded crops and N booleans.

A pickle can name any function and have it called. Here nothing can be named but what these files consist of,
bytes and numpy arrays, and what is called in their place is ours.
"""

import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.contexts.pickled_arrays import STAND_INS, PickledArray, PickledDtype
from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.faces.detect import Detector
from negfacediff_core.recognition.crop_lists import encoded_crops
from negfacediff_core.recognition.fold_accuracy import contiguous_folds
from negfacediff_core.recognition.pair_sets import PairSet, check_pairs, digest_of


class _Dtype(PickledDtype):
    """Stands for `numpy.dtype`, also in files of Python 2, whose text comes as bytes; booleans are bytes."""

    def __init__(self, code: str | bytes, *rest: Any) -> None:
        super().__init__(_text(code), *rest)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__((state[0], _text(state[1]), *state[2:]))

    @property
    def numbers(self) -> "np.dtype[Any]":
        return np.dtype(np.uint8) if self._code == "b1" else super().numbers


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _encode(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, by which Python 3 writes bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it holds text in {encoding!r}")
    return text.encode("latin1")


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    """Stands for `numpy.core.multiarray.scalar`: one boolean or number of numpy's."""
    return np.frombuffer(data, dtype.numbers)[0]


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> NDArray[Any]:
    """Stands for `numpy.core.numeric._frombuffer`, by which protocol 5 writes arrays."""
    return np.frombuffer(data, dtype.numbers).reshape(shape, order="F" if order == "F" else "C")


def _no_bytes() -> bytes:
    """Stands for `bytes`, which Python 3 writes for empty ones."""
    return b""


#: All that a file may name, and what stands in for it.
_ALLOWED: dict[str, Any] = {name: stand_in for stand_in, name in STAND_INS} | {
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
}


# What a file may ask for besides names: containers, numbers, text, bytes, what was read before, and calls.
_OPERATIONS = """
    PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    STRING BINSTRING SHORT_BINSTRING BINBYTES BINBYTES8 SHORT_BINBYTES
    UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE
"""


class _Unpickler(pickle._Unpickler):
    """Reads containers, numbers, text, bytes and arrays; refuses whatever else a file names or asks for.

    This is the form in Python: that in C sets aside as much memory as a damaged file asks for.
    """

    # what pickle keeps there while it reads
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]

    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _OPERATIONS.split())
    }

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of such a set")
        return found

    def _build(self) -> None:
        """Give an array or a type of numbers its state; nothing else has one."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], PickledArray | PickledDtype):
            raise pickle.UnpicklingError("it gives a state to what has none")
        self.stack[-1].__setstate__(state)

    def _bytes_of_array(self) -> None:
        """Bytes that can be written to; here they are read as they are there, whatever length is told."""
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BYTEARRAY8[0]] = _bytes_of_array


def read_bin(path: Path, name: str, detector: Detector | None = None) -> PairSet:
    """Read a `.bin` set: pair i is images 2i and 2i + 1. Crops that are equal byte by byte are kept once.

    The folds are ten stretches of the list, as everywhere in the field; for the detector see `encoded_crops`.
    Raises NegFaceDiffError, naming the file, where it is no such set; nothing in it is ever run.
    """
    images, same = _content(path)
    first_place: dict[bytes, int] = {}
    places = [first_place.setdefault(image, len(first_place)) for image in images]
    names = [""] * len(first_place)
    for number in reversed(range(len(images))):  # an image is called by where it stands first
        names[places[number]] = f"image {number}"
    folds = contiguous_folds(len(same))
    check_pairs(same, folds, str(path))
    crops = encoded_crops(list(first_place), names, str(path), detector)
    numbered = np.array(places, np.int64).reshape(-1, 2)
    return PairSet(name, crops, numbered, same, folds, digest_of([same.tobytes(), *images]))


def _content(path: Path) -> tuple[list[bytes], NDArray[np.bool_]]:
    """The encoded images, and which pairs are genuine."""
    try:
        images, same = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        return [_image(image) for image in images], _flags(same, len(images))
    except NegFaceDiffError as error:
        raise NegFaceDiffError(f"{path} {error}") from error
    except pickle.UnpicklingError as error:
        raise NegFaceDiffError(
            f"{path} was not read, as it could run code or is no pickle ({error}): a verification set holds "
            "encoded images and booleans alone; fetch it again from where it is published"
        ) from error
    except Exception as error:  # a damaged pickle raises dozens of unrelated types
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise NegFaceDiffError(
            f"{path} is no verification set, or damaged ({reason}): expected a pickle of two lists, 2N "
            "encoded images and N booleans"
        ) from error


def _image(image: Any) -> bytes:
    """The bytes of an encoded image, which is stored as such or as an array of uint8."""
    if isinstance(image, PickledArray):
        image = image.values
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image.tobytes()
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    raise NegFaceDiffError(f"holds a {type(image).__name__} where an encoded image (bytes) is expected")


def _flags(same: Any, images: int) -> NDArray[np.bool_]:
    """Which pairs are genuine, from a list or an array of booleans."""
    values = same.values if isinstance(same, PickledArray) else same
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str | bytes):
        raise NegFaceDiffError(f"holds a {type(same).__name__} where a list of booleans is expected")
    wrong = next((value for value in values if value not in (0, 1)), None)
    if wrong is not None:
        raise NegFaceDiffError(f"says {wrong!r} of a pair: only true and false are allowed")
    if images != 2 * len(values):
        raise NegFaceDiffError(f"holds {images:,} images for {len(values):,} pairs: each pair takes two")
    return np.array(values, bool)
