"""Identity contexts: float32 unit vectors `(identities, width)` that a generator is conditioned on, and their
sources.

A drawn context is a function of (seed, identity) alone, so identity i keeps its context when a dataset grows.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.errors import ContextsError
from negfacediff_core.noise import CONTEXTS, gaussian
from negfacediff_core.tensor_files import read_tensors

Contexts = NDArray[np.float32]

_RECONSTRUCT = np.empty(0).__reduce__()[0]
#: The only callables that a published contexts file may name; anything else in the pickle is refused.
_NUMPY_SAFE_GLOBALS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]


class ContextsFile(NamedTuple):
    """What a file of contexts holds: `contexts` `(N, W)` float32 as stored, and one name a row (empty if
    none).
    """

    contexts: Contexts
    names: tuple[str, ...]


class IdentityDistribution(NamedTuple):
    """A normal distribution of identities: `mean` `(W,)` and `covariance` `(W, W)`, both float64.

    `shrinkage` in [0, 1] is the share of the isotropic target that the covariance contains.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    shrinkage: float


def normalise(vectors: NDArray[Any]) -> Contexts:
    """Scale the rows of `(N, W)` to unit length, in float64, and return float32."""
    rows = np.asarray(vectors, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _standard_normal(seed: int, identities: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """Draw `(N, width)` standard normals, one row a given identity number, always on the CPU."""
    draws = gaussian(seed, identities, np.zeros_like(identities), 0, (width,), stream=CONTEXTS)
    return draws.numpy().astype(np.float64)


def uniform(seed: int, identities: NDArray[np.int64], width: int) -> Contexts:
    """Draw uniformly on the unit sphere: c = z / |z|, z ~ N(0, I) (arXiv 2308.04995, "synthetic uniform").

    `identities` are identity *numbers* `(N,)`, so that a work unit draws just its own rows; the result is
    `(N, width)`.
    """
    return normalise(_standard_normal(seed, identities, width))


def fit_identities(reference: NDArray[Any]) -> IdentityDistribution:
    """Fit a normal distribution to reference contexts `(M, W)`, one row (the mean embedding) an identity; M
    >= 2.

    The covariance is S* = (1 - r) S + r (tr S / W) I, with Ledoit and Wolf's r (J. Multivariate Analysis 88,
    2004), the one of least expected squared error: r = min(1, b / d), d = |S - (tr S / W) I|^2, b = (1/M) E
    |x x' - S|^2. It vanishes for large M, and makes draws possible in all W dimensions where M is small.
    """
    rows = np.asarray(reference, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ContextsError(
            f"a fitted source needs at least two reference identities, got an array of shape {rows.shape}: "
            "give a file with one mean embedding for each of many identities"
        )
    count, width = rows.shape
    mean = rows.mean(axis=0)
    centred = rows - mean
    covariance = centred.T @ centred / count
    target = np.eye(width) * (np.trace(covariance) / width)
    distance = float(((covariance - target) ** 2).sum())
    fourth_moment = float((np.square(centred).sum(axis=1) ** 2).mean())
    error = (fourth_moment - float((covariance**2).sum())) / count
    shrinkage = min(1.0, max(0.0, error) / distance) if distance > 0 else 1.0
    return IdentityDistribution(mean, (1 - shrinkage) * covariance + shrinkage * target, shrinkage)


def fitted(
    seed: int, identities: NDArray[np.int64], mean: NDArray[np.float64], covariance: NDArray[np.float64]
) -> Contexts:
    """Draw c = x / |x|, x ~ N(mean, covariance), for identity numbers `(N,)`; the result is `(N, W)`.

    `mean` `(W,)` and `covariance` `(W, W)` come from `fit_identities`, which also says how they were shrunk.
    The same seed gives the same standard normals as `uniform`, here coloured by the covariance's symmetric
    root.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    width = len(mean)
    if covariance.shape != (width, width) or not (np.isfinite(covariance).all() and np.isfinite(mean).all()):
        raise ContextsError(
            f"the covariance of a fitted source must be finite and of shape ({width}, {width}) to go with "
            f"its mean, got shape {covariance.shape}"
        )
    # The symmetric root is unique, where a Cholesky factor fails on a semidefinite covariance.
    variances, axes = np.linalg.eigh(covariance)
    if variances[0] < -1e-6 * max(variances[-1], 0.0) or not np.allclose(covariance, covariance.T):
        raise ContextsError("the covariance of a fitted source must be symmetric and positive semidefinite")
    root = (axes * np.sqrt(np.maximum(variances, 0.0))) @ axes.T
    # One product a row: a matrix product's rounding would depend on how many identities are drawn together.
    coloured = np.matmul(root, _standard_normal(seed, identities, width)[:, :, None])[:, :, 0]
    return normalise(mean + coloured)


def load_contexts(path: str | Path) -> ContextsFile:
    """Read contexts from `.npz` (array `contexts` `(N, W)`, optional `names` `(N,)`) or a published `.npy`.

    A published `.npy` is a `torch.save`d dict {name: float vector} (arXiv 2308.04995). It is read with
    `weights_only=True` and numpy's array constructors alone, so it cannot run code. Raises ContextsError.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                contexts = np.asarray(file["contexts"], dtype=np.float32)
                names = tuple(str(name) for name in file["names"]) if "names" in file else ()
        else:
            with torch.serialization.safe_globals(_NUMPY_SAFE_GLOBALS):
                vectors = read_tensors(path, "cpu")
            names = tuple(str(name) for name in vectors)
            contexts = np.stack([np.asarray(vector, dtype=np.float32) for vector in vectors.values()])
    except FileNotFoundError:
        raise ContextsError(f"the contexts file {path} does not exist: check the path") from None
    except pickle.UnpicklingError as error:
        raise ContextsError(
            f"the contexts file {path} holds more than arrays and was not read, as it could run code: "
            "save a .npz with the array `contexts` instead"
        ) from error
    except Exception as error:  # numpy and torch raise a dozen unrelated types for a damaged file
        raise _unreadable(path, error) from error
    if names and len(names) != len(contexts):
        raise ContextsError(f"the contexts file {path} has {len(names)} names for {len(contexts)} contexts")
    return ContextsFile(contexts, names)


def _unreadable(path: Path, error: Exception) -> ContextsError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ContextsError(
        f"the contexts file {path} cannot be read ({reason}): it must be a .npz with the array `contexts` "
        "(identities, width), or a torch-saved dict of name to vector"
    )


def load_identities(path: str | Path) -> IdentityDistribution:
    """Read what `fitted` draws from: a `.npz` with `mean` and `covariance`, or any contexts file, which is
    fitted here.
    """
    path = Path(path)
    if path.suffix == ".npz" and path.exists() and zipfile.is_zipfile(path):
        try:
            with np.load(path, allow_pickle=False) as file:
                if "mean" in file and "covariance" in file:
                    shrinkage = float(file["shrinkage"]) if "shrinkage" in file else 0.0
                    return IdentityDistribution(file["mean"], file["covariance"], shrinkage)
        except Exception as error:  # as above
            raise _unreadable(path, error) from error
    reference = load_contexts(path).contexts
    check_contexts(reference, reference.shape[-1])
    return fit_identities(normalise(reference))


def _first(rows: Iterable[int], shown: int = 5) -> str:
    """Name the first few rows: "rows 3, 8 and 12 more"."""
    numbers = [int(row) for row in rows]
    more = f" and {len(numbers) - shown} more" if len(numbers) > shown else ""
    return f"row{'s' * (len(numbers) > 1)} " + ", ".join(map(str, numbers[:shown])) + more


def check_contexts(contexts: NDArray[Any], width: int, identities: int | None = None) -> None:
    """Raise ContextsError unless `contexts` is `(N, width)`, finite, non-zero, free of exact duplicates, and
    N >= identities.

    The message names the first bad rows. Lengths other than one are no error: sources normalise.
    """
    if contexts.ndim != 2 or contexts.shape[1] != width:
        raise ContextsError(
            f"contexts of shape {contexts.shape} do not fit a generator that takes width {width}: "
            f"they must be (identities, {width}), from the recogniser that the generator was trained with"
        )
    if identities is not None and len(contexts) < identities:
        raise ContextsError(
            f"{identities} identities were asked for but only {len(contexts)} contexts are given: "
            "ask for fewer identities or bring more contexts"
        )
    unusable = np.flatnonzero(~np.isfinite(contexts).all(axis=1))
    if len(unusable):
        raise ContextsError(f"contexts hold NaN or infinity in {_first(unusable)}: remove or mend these rows")
    empty = np.flatnonzero(~contexts.any(axis=1))
    if len(empty):
        raise ContextsError(f"contexts have zero length in {_first(empty)}: a context must have a direction")
    as_bytes = np.ascontiguousarray(contexts).view(np.dtype((np.void, contexts.dtype.itemsize * width)))[:, 0]
    _, first, group = np.unique(as_bytes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[group] != np.arange(len(contexts)))
    if len(repeated):
        raise ContextsError(
            f"contexts repeat an earlier row exactly in {_first(repeated)} (row {repeated[0]} equals row "
            f"{first[group[repeated[0]]]}): two identities cannot share a context"
        )


def _draw_uniform(seed: int, identities: NDArray[np.int64], width: int, file: str | Path | None) -> Contexts:
    return uniform(seed, identities, width)


def _draw_fitted(seed: int, identities: NDArray[np.int64], width: int, file: str | Path | None) -> Contexts:
    distribution = load_identities(_required(file, "fitted"))
    if len(distribution.mean) != width:
        raise ContextsError(
            f"the reference identities in {file} have width {len(distribution.mean)}, not {width}"
        )
    return fitted(seed, identities, distribution.mean, distribution.covariance)


def _take_from_file(
    seed: int, identities: NDArray[np.int64], width: int, file: str | Path | None
) -> Contexts:
    contexts = load_contexts(_required(file, "file")).contexts
    check_contexts(contexts, width, identities=int(np.max(identities, initial=-1)) + 1)
    return normalise(contexts[identities])


def _required(file: str | Path | None, source: str) -> str | Path:
    if file is None:
        raise ContextsError(f"the context source {source} needs a file of embeddings: set contexts.file")
    return file


#: Each source gives `(N, width)` contexts for (seed, identity numbers `(N,)`, width, file or None).
SOURCES: dict[str, Callable[[int, NDArray[np.int64], int, str | Path | None], Contexts]] = {
    "uniform": _draw_uniform,
    "fitted": _draw_fitted,
    "file": _take_from_file,
}
