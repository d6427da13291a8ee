"""What the demo pack is made from: its render sets, the generator's training set, its context sources."""

import hashlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flows.progress import CallbackBar
from negfacediff_core.contexts import check_contexts, fit_identities
from negfacediff_core.diffusion.first_stage import VQEncoder
from negfacediff_core.diffusion.train_first_stage import load_first_stage
from negfacediff_core.diffusion.training import Progress
from negfacediff_core.diffusion.training_set import (
    TrainingSet,
    embed_images,
    encode_latents,
    identity_means,
)
from negfacediff_core.faces.embed import Embedder, load_embedder
from negfacediff_core.renders.dataset import RenderSet, load_render_set
from negfacediff_core.store.location import locate


class RenderSettings(NamedTuple):
    """Arguments of `renders.dataset.render_set`. The sets share no identity number, so no identity."""

    identities: range
    replicates: int
    size: int
    scale: float | tuple[float, float]
    seed: int = 0


RENDER_SETS: dict[str, RenderSettings] = {
    # recogniser, judge, first stage and generator are trained on these
    "train": RenderSettings(range(8000), replicates=6, size=64, scale=0.9),
    # contexts that nothing was trained on, and the figures on held-out images
    "heldout": RenderSettings(range(1_000_000, 1_000_300), replicates=12, size=64, scale=0.9),
    # frames for the detector, with faces of all sizes anywhere
    "detector": RenderSettings(range(2_000_000, 2_001_500), replicates=4, size=96, scale=(0.35, 1.1)),
}


def renders_of(work: Path, name: str) -> RenderSet:
    """Return the render set `name` that `negfacediff pack render` left in the work folder."""
    return load_render_set(work / "renders" / name)


def contexts_of(work: Path, out: Path, name: str) -> NDArray[np.float32]:
    """Embed a render set with the recogniser of the pack `out`: `(N, K, W)`; made once, with a bar."""
    renders, embedder = renders_of(work, name), load_embedder(out / "faces")
    with CallbackBar(f"embed {name}", "images") as progress:
        return prepare_contexts(renders.images, renders.landmarks, embedder, work / "cache", progress)


def training_set_of(work: Path, out: Path, name: str) -> TrainingSet:
    """Return the latents of a render set, by the first stage trained in the work folder, and its contexts."""
    encoder, _, _ = load_first_stage(work / "first-stage")
    contexts = torch.from_numpy(contexts_of(work, out, name))
    with CallbackBar(f"encode {name}", "images") as progress:
        latents = prepare_latents(renders_of(work, name).images, encoder, work / "cache", progress)
    return TrainingSet(latents, contexts)


def prepare_contexts(
    images: NDArray[np.uint8],
    landmarks: NDArray[np.float32],
    embedder: Embedder,
    cache: Path,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Unit embeddings `(N, K, W)` of a render set, `(N, K, S, S, 3)` uint8 with `(N, K, 5, 2)` landmarks.

    They are kept in the folder `cache` under the hash of the pictures and of the recogniser, and read from
    there the next time. `progress(done, total, 0)` counts images.
    """
    path = cache / f"contexts-{_digest([images[:, 0].tobytes()])}-{embedder.sha256[:12]}.npy"
    return _cached(path, lambda: embed_images(embedder, images, landmarks, progress))


def prepare_latents(
    images: NDArray[np.uint8], encoder: VQEncoder, cache: Path, progress: Progress | None = None
) -> torch.Tensor:
    """Latents of a render set as `encode_latents` makes them, kept like `prepare_contexts`."""
    weights = _digest(tensor.numpy().tobytes() for tensor in encoder.state_dict().values())
    path = cache / f"latents-{_digest([images[:, 0].tobytes()])}-{weights}.npy"
    return torch.from_numpy(_cached(path, lambda: encode_latents(encoder, images, progress).numpy()))


def write_context_sources(
    folder: Path,
    held_out: NDArray[np.float32],
    identities: NDArray[np.int64],
    training: NDArray[np.float32],
) -> dict[str, Any]:
    """Write the context sources that the pack ships and return what is worth knowing of them.

    `heldout.npz` holds one context an identity of `held_out` `(N, K, W)`, the normalised mean of its unit
    embeddings, and names made of the `(N,)` identity numbers. `reference.npz` holds mean and covariance of
    the identity means of `training` `(M, K, W)`, which the source *fitted* draws from. Raises ContextsError
    for degenerate embeddings.
    """
    contexts = identity_means(held_out)
    check_contexts(contexts, training.shape[2])
    reference = fit_identities(identity_means(training))
    names = np.array([f"render-{number}" for number in identities])
    _write(folder / "heldout.npz", np.savez_compressed, contexts=contexts, names=names)
    _write(
        folder / "reference.npz",
        np.savez_compressed,
        mean=reference.mean.astype(np.float32),
        covariance=reference.covariance.astype(np.float32),
        shrinkage=np.float64(reference.shrinkage),
    )
    variances = np.linalg.eigvalsh(reference.covariance)
    return {
        "held_out": len(contexts),
        "reference": len(training),
        "width": training.shape[2],
        "shrinkage": reference.shrinkage,
        "participation_ratio": float(variances.sum() ** 2 / np.square(variances).sum()),
    }


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def _cached(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """The array in `path`, made and stored there if it is not there yet."""
    if path.exists():
        return np.load(path)
    array = make()
    _write(path, np.save, arr=array)
    return array


def _write(path: Path, save: Callable[..., None], **arrays: Any) -> None:
    """Write what numpy's `save` makes of the arrays, in one piece: a crash leaves no half file."""
    buffer = io.BytesIO()
    save(buffer, **arrays)
    folder = locate(str(path.parent))
    folder.check_writable()
    folder.write_atomic(path.name, buffer.getvalue())
