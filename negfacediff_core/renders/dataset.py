"""Render sets: many identities rendered to disk in blocks, resumable, on several processes."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.renders.asset import ASSET_PATH
from negfacediff_core.renders.identity import draw_identity
from negfacediff_core.renders.render import DEFAULT_SHIFT, RENDERER_VERSION, check_geometry, render

#: Identities in a block, the unit of work and of resuming.
BLOCK = 50
SETTINGS = "settings.json"
#: Native libraries start a pool of threads in every process unless these say otherwise.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")

Progress = Callable[[int, int], None]


class RenderSet(NamedTuple):
    """N identities x K replicates; pixel coordinates as in `render.Render`."""

    images: NDArray[np.uint8]  # (N, K, size, size, 3) RGB
    landmarks: NDArray[np.float32]  # (N, K, 5, 2)
    boxes: NDArray[np.float32]  # (N, K, 4)
    identities: NDArray[np.int64]  # (N,)


class _Block(NamedTuple):
    path: Path
    identities: range


def render_set(
    folder: str | Path,
    seed: int,
    identities: range,
    replicates: int,
    size: int = 64,
    scale: float | tuple[float, float] = 0.9,
    shift: float = DEFAULT_SHIFT,
    workers: int = 2,
    progress: Progress | None = None,
) -> Path:
    """Render consecutive `identities` x `replicates` into `folder` and return it.

    Every 50 identities become one `block-00042.npz`, written whole or not at all. Blocks that are there are
    kept, so the same call resumes an interrupted one; the number of workers never changes a pixel.
    `progress(done, total)` is called in this process with numbers of identities. With more than one worker,
    processes are spawned: a script that calls this needs the usual `if __name__ == "__main__":`.

    Raises ConfigError for impossible arguments, or when `folder` holds a render set of other settings.
    """
    if identities.step != 1 or len(identities) == 0 or identities.start < 0 or seed < 0:
        raise ConfigError(
            f"cannot render identities {identities} of seed {seed}: give a non-empty range of consecutive "
            "identities, none negative, and a seed of 0 or more."
        )
    if replicates < 1 or workers < 1:
        raise ConfigError(f"replicates and workers must be at least 1, got {replicates} and {workers}.")
    check_geometry(size, scale)
    folder = Path(folder)
    settings = {
        "seed": seed,
        "first_identity": identities.start,
        "identities": len(identities),
        "replicates": replicates,
        "size": size,
        "scale": list(scale) if isinstance(scale, tuple) else scale,
        "shift": shift,
        "block": BLOCK,
        "renderer": RENDERER_VERSION,
        "asset": hashlib.sha256(ASSET_PATH.read_bytes()).hexdigest(),
    }
    _claim(folder, settings)
    pending = [block for block in _blocks(folder, settings) if not block.path.exists()]
    done = len(identities) - sum(len(block.identities) for block in pending)
    for finished in _render_blocks(pending, settings, workers):
        done += finished
        if progress is not None:
            progress(done, len(identities))
    return folder


def load_render_set(folder: str | Path) -> RenderSet:
    """Read a finished render set into memory.

    Raises StoreError when the folder holds no render set, when blocks are missing, or when one cannot be
    read.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    if settings is None:
        raise StoreError(
            f"{folder} holds no render set (no {SETTINGS}); make one with `negfacediff pack render`."
        )
    blocks = _blocks(folder, settings)
    missing = [block.path.name for block in blocks if not block.path.exists()]
    if missing:
        raise StoreError(
            f"{folder} lacks {len(missing)} of {len(blocks)} blocks ({', '.join(missing[:3])} ...): the "
            "rendering was interrupted; run it again with the same settings to finish it."
        )
    count, replicates, size = settings["identities"], settings["replicates"], settings["size"]
    loaded = RenderSet(
        images=np.empty((count, replicates, size, size, 3), np.uint8),
        landmarks=np.empty((count, replicates, 5, 2), np.float32),
        boxes=np.empty((count, replicates, 4), np.float32),
        identities=settings["first_identity"] + np.arange(count),
    )
    for index, block in enumerate(blocks):
        here = slice(index * BLOCK, index * BLOCK + len(block.identities))
        try:
            with np.load(block.path, allow_pickle=False) as archive:
                for name in ("images", "landmarks", "boxes"):
                    getattr(loaded, name)[here] = archive[name]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise StoreError(
                f"{block.path} cannot be read ({error}); delete it and run the rendering again with the "
                "same settings."
            ) from error
    return loaded


def _blocks(folder: Path, settings: dict[str, Any]) -> list[_Block]:
    start = settings["first_identity"]
    identities = range(start, start + settings["identities"])
    return [
        _Block(folder / f"block-{index:05d}.npz", identities[index * BLOCK : (index + 1) * BLOCK])
        for index in range(-(-len(identities) // BLOCK))
    ]


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder, or check that they are those of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    existing = _read_settings(folder)
    if existing is None:
        temporary = folder / f".{SETTINGS}.{os.getpid()}"
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        temporary.replace(folder / SETTINGS)
        return
    names = sorted(settings.keys() | existing.keys())
    differing = [name for name in names if settings.get(name) != existing.get(name)]
    if differing:
        listed = "; ".join(f"{n} {existing.get(n)!r} there, {settings.get(n)!r} asked for" for n in differing)
        raise ConfigError(
            f"{folder} holds a render set of other settings ({listed}): use those, another folder, or "
            "delete this one."
        )


def _read_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / SETTINGS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(
            f"{path} is not readable JSON ({error}); delete the folder and render it anew."
        ) from error


def _render_blocks(pending: list[_Block], settings: dict[str, Any], workers: int) -> Iterator[int]:
    """Render the blocks and yield the number of identities of each as it is finished."""
    if workers == 1 or len(pending) <= 1:
        for block in pending:
            yield _render_block(block, settings)
        return
    with _single_threaded_children():
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            futures = [pool.submit(_render_block, block, settings) for block in pending]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded_children() -> Iterator[None]:
    """Let processes spawned meanwhile run native code on one thread each: the work is divided already."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _render_block(block: _Block, settings: dict[str, Any]) -> int:
    scale = settings["scale"]
    rows = []
    for number in block.identities:
        identity = draw_identity(settings["seed"], number)
        rows.append(
            [
                render(
                    identity,
                    replicate,
                    size=settings["size"],
                    scale=tuple(scale) if isinstance(scale, list) else scale,
                    shift=settings["shift"],
                )
                for replicate in range(settings["replicates"])
            ]
        )
    temporary = block.path.with_name(f".{block.path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                images=np.array([[face.image for face in row] for row in rows]),
                landmarks=np.array([[face.landmarks for face in row] for row in rows]),
                boxes=np.array([[face.box for face in row] for row in rows]),
            )
        temporary.replace(block.path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(block.identities)
