"""Weights of the stages: finding and hashing their files, and loading each network once a process."""

import hashlib
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

import negfacediff_core
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.diffusion.checkpoint import Generator, load_generator, weight_files
from negfacediff_core.diffusion.precision import products_in
from negfacediff_core.diffusion.release_config import read_config
from negfacediff_core.errors import ContextsError, WeightsError
from negfacediff_core.faces.detect import Detector, load_detector
from negfacediff_core.faces.embed import Embedder, load_embedder
from negfacediff_core.faces.packs import Task, find_network
from negfacediff_core.faces.providers import lacking_cuda
from negfacediff_core.faces.quality import FaceScorer, load_attributes, load_quality
from negfacediff_core.file_hashes import file_sha256
from negfacediff_core.gpu_turns import turn_of
from negfacediff_core.store.layout import Weight

logger = logging.getLogger(__name__)

PROJECT = Path(negfacediff_core.__file__).resolve().parents[1]

Hashes = tuple[tuple[str, str], ...]

# Threads that start together would otherwise each load the same network before the first has cached it.
_loading = threading.Lock()


def resolve_weights(path: str) -> Path:
    """Return the absolute path of a file or folder, looked for here and then in the project's own folder.

    Raises:
        WeightsError: if it is in neither place.
    """
    for place in (Path.cwd(), PROJECT):
        if (place / path).exists():
            return (place / path).resolve()
    raise WeightsError(
        f"there is nothing at {path}: looked in {Path.cwd()} and {PROJECT}; give the path of the weights."
    )


@contextmanager
def named(field: str) -> Iterator[None]:
    """Say which field of the build an error of weights or contexts is about."""
    try:
        yield
    except (WeightsError, ContextsError) as error:
        raise type(error)(f"{field}: {error}") from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; an unchanged file is hashed once a process."""
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_file(path: Path, size: int, modified: int) -> str:
    return file_sha256(path)


def hash_files(folder: Path, files: Iterable[Path]) -> str:
    """Return the SHA-256 over the sorted paths of `files` in `folder` and their contents.

    While names, sizes and times stay, the contents are read once a process.
    """
    listing = []
    for file in sorted(files):
        stat = file.stat()
        listing.append((file.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return _hash_files(folder, tuple(listing))


@lru_cache(maxsize=16)
def _hash_files(folder: Path, listing: tuple[tuple[str, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for name, _, _ in listing:
        whole.update(f"{file_sha256(folder / name)} {name}\n".encode())
    return whole.hexdigest()


def file_weight(path: str) -> Weight:
    """Find and hash one file."""
    file = resolve_weights(path)
    if not file.is_file():
        raise WeightsError(f"{file} is a folder where a file is needed; give the path of the file.")
    return Weight(str(file), {"file": hash_file(file)})


def folder_weight(path: str, files: Iterable[Path]) -> Weight:
    """Hash these files of a folder, names and contents, as one."""
    folder = resolve_weights(path)
    return Weight(str(folder), {"folder": hash_files(folder, files)})


def network_weight(path: str, task: Task) -> Weight:
    """Find and hash the network for `task` in a model pack."""
    return file_weight(str(find_network(resolve_weights(path), task)))


def check_unchanged(before: Weight, now: Weight) -> None:
    """Raise WeightsError unless what was hashed for a plan still is the same."""
    if now != before:
        raise _changed(before.path)


def generator_weight(path: str) -> Weight:
    """Find and hash the files of a generator's folder."""
    folder = resolve_weights(path)
    return Weight(str(folder), {role: hash_file(file) for role, file in weight_files(folder).items()})


def conditioner_hash(path: str) -> str | None:
    """Return the SHA-256 of the recogniser that a generator was trained with, where its folder tells."""
    constants = read_config(resolve_weights(path))["constants"]
    return constants.get("conditioner_sha256")


def generator_of(weight: Weight, device: str) -> Generator:
    """Return the generator of a folder on a device; WeightsError if it is not what was hashed."""
    with _loading:
        return _generator(weight.path, _hashes(weight), device)


@lru_cache(maxsize=1)
def _generator(path: str, hashes: Hashes, device: str) -> Generator:
    if _hashes(generator_weight(path)) != hashes:
        raise _changed(path)
    return load_generator(path, device)


def detector_of(
    weight: Weight, input_size: int, threshold: float, threads: int, device: str = "cpu"
) -> Detector:
    """Return the detector of a file on a device; WeightsError if it is not what was hashed."""
    with _loading:
        return _detector(weight.path, _hashes(weight), input_size, threshold, threads, device)


@lru_cache(maxsize=1)
def _detector(
    path: str, hashes: Hashes, input_size: int, threshold: float, threads: int, device: str
) -> Detector:
    detector = load_detector(path, input_size, threshold, threads, device)
    if hashes != (("file", detector.sha256),):
        raise _changed(path)
    return detector


def embedder_of(weight: Weight, threads: int, device: str = "cpu") -> Embedder:
    """Return the recogniser of a file on a device; WeightsError if it is not what was hashed."""
    with _loading:
        return _embedder(weight.path, _hashes(weight), threads, device)


# as many as a unit may ask in turn
@lru_cache(maxsize=2)
def _embedder(path: str, hashes: Hashes, threads: int, device: str) -> Embedder:
    embedder = load_embedder(path, threads, device)
    if hashes != (("file", embedder.sha256),):
        raise _changed(path)
    return embedder


def scorer_of(weight: Weight, kind: str, threads: int, device: str = "cpu") -> FaceScorer:
    """Return the network of `SCORERS` of a file on a device; WeightsError if it is not what was hashed."""
    with _loading:
        return _scorer(weight.path, _hashes(weight), kind, threads, device)


SCORERS = {"quality": load_quality, "attributes": load_attributes}


@lru_cache(maxsize=len(SCORERS))
def _scorer(path: str, hashes: Hashes, kind: str, threads: int, device: str) -> FaceScorer:
    scorer = SCORERS[kind](path, threads, device)
    if hashes != (("file", scorer.sha256),):
        raise _changed(path)
    return scorer


def device_of(device: str) -> str:
    """Return the torch device of an execution setting: `auto` is a GPU if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def scores_device_of(device: str) -> str:
    """Return the device that scores are made on: the asked one, or the CPU where there is no GPU.

    Scores are the same on both within rounding, and a cluster's workers without GPU make them, too.
    """
    return device_of(device) if torch.cuda.is_available() else "cpu"


@contextmanager
def scoring_on(device: str) -> Iterator[None]:
    """Hold the turn of a GPU, which multiplies float32 exactly meanwhile, whatever is sampled beside it."""
    with turn_of(device), products_in("fp32", torch.device(device)):
        yield


def faces_device_of(execution: ExecutionConfig) -> str:
    """Return the device that faces are found and embedded on in this process: cpu, cuda or cuda:N.

    `auto` is the GPU that samples, where onnxruntime can use it; where it cannot, the log says why, once.
    """
    if execution.faces_device != "auto":
        return execution.faces_device
    device = device_of(execution.device)
    return device if device != "cpu" and _has_cuda_for_faces(device) else "cpu"


@lru_cache
def _has_cuda_for_faces(device: str) -> bool:
    lacking = lacking_cuda(device)
    if lacking is not None:
        logger.info("faces are found and embedded on the CPU: %s", lacking)
    return lacking is None


def describe_device(device: str) -> str:
    """Return what a completion record calls a torch device."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def _hashes(weight: Weight) -> Hashes:
    return tuple(sorted(weight.sha256.items()))


def _changed(path: str) -> WeightsError:
    return WeightsError(f"{path} has changed since this build was planned; run the same command again.")
