"""Files of embeddings: `.npz`, Parquet, Zarr, and the published `torch.save`d dictionaries."""

import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr
from numpy.typing import NDArray

from negfacediff_core.contexts.draws import IdentityDistribution, fit_identities
from negfacediff_core.contexts.pickled_arrays import STAND_INS, PickledArray
from negfacediff_core.contexts.vectors import Contexts, check_contexts, normalise
from negfacediff_core.errors import ContextsError
from negfacediff_core.tensor_files import read_tensors

#: What the array or column of embeddings may be called, and that of names; the first that is there counts.
ARRAYS = ("contexts", "context", "embeddings", "embedding")
NAMES = ("names", "name")


class ContextsFile(NamedTuple):
    """What a file of contexts holds: `contexts` `(N, W)` float32 as stored, and one name a row (empty if
    none).
    """

    contexts: Contexts
    names: tuple[str, ...]


def load_contexts(path: str | Path) -> ContextsFile:
    """Read embeddings `(N, W)` of floating-point numbers, and their names where the file has them.

    `.npz` and Zarr (a folder: a group of arrays, or one array) hold an array, and Parquet (`.parquet`) a
    column of equally long lists, with a name in ARRAYS. Any other file is a published `.npy`: a `torch.save`d
    dict {name: float vector} (arXiv 2308.04995), read with `weights_only=True` and stand-ins for numpy's
    arrays alone, so it cannot run code. Raises ContextsError.
    """
    path = Path(path)
    if not path.exists():
        raise ContextsError(f"the contexts file {path} does not exist: check the path")
    read = _read_zarr if path.is_dir() else _READERS.get(path.suffix, _read_published)
    try:
        contexts, names = read(path)
    except ContextsError as error:
        raise ContextsError(f"the contexts file {path} {error}") from error
    except pickle.UnpicklingError as error:
        raise ContextsError(
            f"the contexts file {path} holds more than arrays and was not read, as it could run code: "
            "save a .npz with the array `contexts` instead"
        ) from error
    except Exception as error:  # numpy, torch, zarr and pyarrow raise dozens of types for a damaged file
        raise _unreadable(path, error) from error
    if contexts.dtype.kind != "f":
        raise ContextsError(
            f"the contexts file {path} holds values of type {contexts.dtype}: embeddings are floating-point "
            "numbers, best float32"
        )
    if len(names) and len(names) != len(contexts):
        raise ContextsError(f"the contexts file {path} has {len(names)} names for {len(contexts)} contexts")
    return ContextsFile(contexts.astype(np.float32, copy=False), tuple(str(name) for name in names))


def load_reference(path: str | Path, width: int) -> Contexts:
    """Read the unit contexts `(N, width)` of a file; ContextsError if any is unusable (`check_contexts`)."""
    contexts = load_contexts(path).contexts
    check_contexts(contexts, width)
    unit = normalise(contexts)
    check_contexts(unit, width)  # two vectors that differ in length alone are one identity
    return unit


def load_identities(path: str | Path) -> IdentityDistribution:
    """Read what `fitted` draws from: a `.npz` with `mean` and `covariance`, or any contexts file, which is
    fitted here.
    """
    path = Path(path)
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        try:
            with np.load(path, allow_pickle=False) as file:
                if "mean" in file and "covariance" in file:
                    shrinkage = float(file["shrinkage"]) if "shrinkage" in file else 0.0
                    return _checked(path, IdentityDistribution(file["mean"], file["covariance"], shrinkage))
        except ContextsError:
            raise
        except Exception as error:  # as above
            raise _unreadable(path, error) from error
    reference = load_contexts(path).contexts
    check_contexts(reference, reference.shape[-1])
    return fit_identities(normalise(reference))


def _checked(path: Path, distribution: IdentityDistribution) -> IdentityDistribution:
    mean, covariance, _ = distribution
    fits = mean.ndim == 1 and covariance.shape == (mean.size, mean.size)
    numbers = mean.dtype.kind == "f" and covariance.dtype.kind == "f"
    if not (fits and numbers and np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ContextsError(
            f"the contexts file {path} holds a mean {mean.shape} {mean.dtype} and a covariance "
            f"{covariance.shape} {covariance.dtype}: they must be finite floating-point numbers, (W,) "
            "and (W, W)"
        )
    if not mean.any() and not covariance.any():
        raise ContextsError(
            f"the contexts file {path} describes a single point without direction: all is zero"
        )
    return distribution


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | tuple[()]]:
    with np.load(path, allow_pickle=False) as file:
        return file[_find(file)], next((file[name] for name in NAMES if name in file), ())


def _read_zarr(path: Path) -> tuple[NDArray[Any], NDArray[Any] | tuple[()]]:
    stored = zarr.open(path, mode="r")
    if isinstance(stored, zarr.Array):
        return np.asarray(stored[:]), ()
    arrays = dict(stored.arrays())
    names = next((np.asarray(arrays[name][:]) for name in NAMES if name in arrays), ())
    return np.asarray(arrays[_find(arrays)][:]), names


def _read_parquet(path: Path) -> tuple[NDArray[Any], list[str] | tuple[()]]:
    file = pq.ParquetFile(path)
    column = _find(file.schema_arrow.names)
    name = next((name for name in NAMES if name in file.schema_arrow.names), None)
    table = file.read([column] if name is None else [column, name])
    lists = table.column(column).combine_chunks()
    if not (pa.types.is_list(lists.type) or pa.types.is_fixed_size_list(lists.type)):
        raise ContextsError(f"has a column {column} of {lists.type}: embeddings are lists of numbers")
    lengths = set(lists.value_lengths().to_pylist())
    if len(lengths) != 1 or None in lengths or lists.flatten().null_count:
        raise ContextsError(f"has a column {column} of lists that are empty, or not equally long")
    values = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), -1)
    return values, () if name is None else table.column(name).to_pylist()


def _read_published(path: Path) -> tuple[NDArray[Any], tuple[str, ...]]:
    with torch.serialization.safe_globals(STAND_INS):
        vectors = read_tensors(path, "cpu")
    rows = [
        vector.values if isinstance(vector, PickledArray) else np.asarray(vector)
        for vector in vectors.values()
    ]
    return np.stack(rows), tuple(vectors)


_READERS: dict[str, Callable[[Path], tuple[NDArray[Any], Any]]] = {
    ".npz": _read_npz,
    ".parquet": _read_parquet,
}


def _find(there: Iterable[str]) -> str:
    """The name of the embeddings among the arrays or columns of a file."""
    found = list(there)
    for name in ARRAYS:
        if name in found:
            return name
    raise ContextsError(
        f"holds {', '.join(found) or 'nothing'}, but none of {', '.join(ARRAYS)}: give the array or column "
        "of embeddings one of these names"
    )


def _unreadable(path: Path, error: Exception) -> ContextsError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ContextsError(
        f"the contexts file {path} cannot be read ({reason}): it must be a .npz, Parquet or Zarr with the "
        "array `contexts` (identities, width), or a torch-saved dict of name to vector"
    )
