"""numpy's arrays in files of `torch.save`, rebuilt without numpy's own unpickling.

`weights_only` lets nothing but listed names be called, but numpy's dtypes believe whatever state they are
given: one changed bit in a file makes it take numbers for pointers. Here only the values are taken over.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray


class PickledDtype:
    """Stands for `numpy.dtype`: integers and floating-point numbers of a byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    @property
    def numbers(self) -> "np.dtype[Any]":
        """The type of number; ValueError for any other."""
        found = f"{self._order}{self._code}"
        if not re.fullmatch(r"[<>=|][fiu][1248]", found):
            raise ValueError(f"its arrays are of {found!r}, which are no numbers")
        return np.dtype(found)


class PickledArray:
    """Stands for `numpy.ndarray`; `values` are there once its state has been read."""

    values: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_column, data = state
        self.values = np.frombuffer(data, dtype.numbers).reshape(shape, order="F" if by_column else "C")


def _reconstruct(*_: Any) -> PickledArray:
    return PickledArray()


#: The only callables that a file of arrays may name, and what stands in for them.
STAND_INS: list[Any] = [
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (PickledArray, "numpy.ndarray"),
    (PickledDtype, "numpy.dtype"),
]
