"""Training of a recogniser on rendered faces, measured on identities that are held out."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError
from negfacediff_core.images import to_float
from negfacediff_core.processor import fast_bfloat16
from negfacediff_core.recognition.augment import augment, pooled_crops
from negfacediff_core.recognition.backbones import IResNet, PlainNet, build_backbone
from negfacediff_core.recognition.heads import MARGINS, cosines
from negfacediff_core.recognition.measure import embed_pooled_crops, held_out_figures
from negfacediff_core.recognition.seeds import generator_of, seed_of
from negfacediff_core.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from negfacediff_core.renders.dataset import RenderSet

Progress = Callable[[int, int, float], None]  # step, steps, smoothed loss
CHECKPOINT_NAME = "checkpoint.pt"
CURVE_EVERY = 20


@dataclass(frozen=True)
class TrainingSettings:
    """What training does; its result is a function of these, the architecture and the render set."""

    steps: int  # optimiser steps
    batch_size: int = 128
    learning_rate: float = 0.1  # at its peak
    warmup: float = 0.03  # share of the steps in which the rate rises; then it falls by a cosine to zero
    weight_decay: float = 5e-4
    head: str = "cosface"  # a row of MARGINS
    scale: float = 24.0
    margin: float = 0.35
    margin_ramp: tuple[float, float] = (0.05, 0.3)  # shares of the steps between which the margin grows
    held_out: int = 200  # identities at the end of the render set that are never trained on
    seed: int = 0
    checkpoint_every: int = 200  # steps


@dataclass
class _Run:
    """What a checkpoint restores. Random numbers are functions of (seed, step), so they are no state."""

    backbone: IResNet | PlainNet
    centres: nn.Parameter
    optimiser: torch.optim.SGD
    step: int
    loss: float
    seconds: float
    curve: list[list[float]]


def train_recogniser(
    render_set: "RenderSet",
    architecture: dict[str, Any],
    settings: TrainingSettings,
    checkpoint_folder: Path,
    progress: Progress | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Train a network of `architecture` (see `build_backbone`), or continue from the folder's checkpoint.

    `render_set.images` is `(identities, replicates, S, S, 3)` uint8 with exact `landmarks` `(..., 5, 2)`;
    crops are aligned once. On one machine a run that was interrupted and continued equals an uninterrupted
    one bit for bit. `deadline` is a moment of `time.monotonic()`: past it the run saves its checkpoint and
    returns early, with `step` below `steps`; the same call goes on from there.

    Returns `step`, `steps`, `seconds`, `parameters`, `precision`, `curve` (rows of step, smoothed loss,
    learning rate) and the figures of `held_out_figures` on the held-out identities; the checkpoint keeps
    them too. Raises ConfigError for settings that cannot work or that a checkpoint in the folder
    contradicts, WeightsError for a checkpoint that cannot be read.
    """
    trained = _check(render_set.images.shape[0], settings)
    replicates = render_set.images.shape[1]
    backbone = build_backbone(architecture, settings.seed)
    # Convolutions on a CPU are a quarter faster in this layout.
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    origin = {"architecture": architecture, "settings": asdict(settings), "trained_on": [trained, replicates]}
    run = _start(backbone, trained, settings)
    checkpoint = checkpoint_folder / CHECKPOINT_NAME
    if checkpoint.exists():
        _restore(run, read_checkpoint(checkpoint), origin, checkpoint)

    images = render_set.images.reshape(-1, *render_set.images.shape[2:])
    crops = pooled_crops(images, render_set.landmarks.reshape(-1, 5, 2), backbone.input_pool)
    labels = torch.arange(trained).repeat_interleave(replicates)
    started = time.monotonic() - run.seconds
    while run.step < settings.steps and (deadline is None or time.monotonic() < deadline):
        _train_step(run, crops, labels, settings)
        run.seconds = time.monotonic() - started
        if progress:
            progress(run.step, settings.steps, run.loss)
        if run.step % settings.checkpoint_every == 0:
            _save(run, origin, {}, checkpoint)

    held_out = crops[trained * replicates :]
    embeddings = embed_pooled_crops(backbone, held_out)
    metrics = {
        "step": run.step,
        "steps": settings.steps,
        "seconds": run.seconds,
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "precision": "bf16" if fast_bfloat16() else "fp32",
        "trained_identities": trained,
        "replicates": replicates,
        "curve": run.curve,
        **held_out_figures(embeddings.reshape(settings.held_out, replicates, -1)),
    }
    _save(run, origin, metrics, checkpoint)
    return metrics


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint (tensors, numbers, text). Raises WeightsError if it cannot be read."""
    try:
        return read_tensors(path)
    except FileNotFoundError as error:
        raise WeightsError(
            f"There is no recogniser checkpoint at {path}; train the network first."
        ) from error
    except Exception as error:
        raise WeightsError(
            f"The recogniser checkpoint {path} cannot be read ({type(error).__name__}): delete it to train "
            "afresh."
        ) from error


def _check(identities: int, settings: TrainingSettings) -> int:
    """Return the number of identities to train on, or say why the settings cannot work."""
    if settings.head not in MARGINS:
        raise ConfigError(f"Unknown head {settings.head!r}; the heads are {', '.join(MARGINS)}.")
    if settings.steps < 1 or settings.batch_size < 2 or settings.held_out < 2:
        raise ConfigError(
            "Recogniser training needs at least 1 step, batches of 2 and 2 held-out identities; got "
            f"{settings.steps} steps, batches of {settings.batch_size} and {settings.held_out} identities."
        )
    trained = identities - settings.held_out
    if trained < 2:
        raise ConfigError(
            f"The render set has {identities} identities, of which {settings.held_out} are held out: at "
            "least 2 must be left to train on. Render more identities or hold out fewer."
        )
    return trained


def _start(backbone: IResNet | PlainNet, identities: int, settings: TrainingSettings) -> _Run:
    """A run at step 0; the class centres start at random directions."""
    width = backbone.fc.out_features
    centres = torch.randn(identities, width, generator=generator_of(settings.seed, "centres", 0))
    parameter = nn.Parameter(centres / math.sqrt(width))
    trainable = [p for p in backbone.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1] + [parameter], "weight_decay": settings.weight_decay},
        # Norm gains, biases and PReLU slopes are not decayed.
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True)
    return _Run(backbone, parameter, optimiser, step=0, loss=0.0, seconds=0.0, curve=[])


def _train_step(run: _Run, crops: NDArray[np.uint8], labels: Tensor, settings: TrainingSettings) -> None:
    """One step of SGD on a batch that depends on (seed, step) alone."""
    rows = _batch(run.step, len(labels), settings)
    batch = augment(to_float(crops[rows.numpy()]), generator_of(settings.seed, "augment", run.step))
    batch = batch.contiguous(memory_format=torch.channels_last)
    rate, margin = _schedule(run.step, settings)
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    run.backbone.train()
    with (
        torch.random.fork_rng(devices=[]),  # dropout draws from the global generator
        torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()),
    ):
        torch.default_generator.manual_seed(seed_of(settings.seed, "dropout", run.step))
        embeddings = run.backbone.embed_pooled(batch)
    cosine = cosines(embeddings, run.centres)
    loss = F.cross_entropy(MARGINS[settings.head](cosine, labels[rows], settings.scale, margin), labels[rows])
    if not torch.isfinite(loss):
        raise NegFaceDiffError(
            f"Recogniser training diverged at step {run.step}: the loss is {loss.item()}. Lower the learning "
            f"rate ({settings.learning_rate}) or the scale ({settings.scale})."
        )
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    run.optimiser.step()
    run.loss = loss.item() if run.step == 0 else 0.95 * run.loss + 0.05 * loss.item()
    run.step += 1
    if run.step % CURVE_EVERY == 0:
        run.curve.append([run.step, run.loss, rate])


def _schedule(step: int, settings: TrainingSettings) -> tuple[float, float]:
    """Learning rate and margin at `step`: warm-up then half a cosine, and a linear ramp."""
    share = step / settings.steps
    warm = min(1.0, (step + 1) / max(1.0, settings.warmup * settings.steps))
    rate = settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * share))
    first, last = settings.margin_ramp
    return rate, settings.margin * min(1.0, max(0.0, (share - first) / (last - first)))


def _batch(step: int, count: int, settings: TrainingSettings) -> Tensor:
    """Rows of the batch at `step`: parts of one permutation an epoch, an incomplete last part left out."""
    size = min(settings.batch_size, count)
    epoch, index = divmod(step, count // size)
    order = torch.randperm(count, generator=generator_of(settings.seed, "order", epoch))
    return order[index * size : (index + 1) * size]


def _save(run: _Run, origin: dict[str, Any], metrics: dict[str, Any], path: Path) -> None:
    """Write the checkpoint in one piece: a crash leaves the old one or the new one."""
    state = {
        **origin,
        "backbone": run.backbone.state_dict(),
        "centres": run.centres.detach(),
        "optimiser": run.optimiser.state_dict(),
        "step": run.step,
        "loss": run.loss,
        "seconds": run.seconds,
        "curve": run.curve,
        "metrics": metrics,
    }
    write_tensors(path, state)


def _restore(run: _Run, state: dict[str, Any], origin: dict[str, Any], path: Path) -> None:
    """Bring `run` to where `state` left it, after checking that it is the same training."""
    different = [key for key, value in origin.items() if state.get(key) != value]
    if different:
        raise ConfigError(
            f"The checkpoint {path} is of another training: its {' and '.join(different)} differ. Continue "
            "with what it was started with, or choose another folder."
        )
    run.backbone.load_state_dict(state["backbone"])
    run.centres.data.copy_(state["centres"])
    run.optimiser.load_state_dict(state["optimiser"])
    run.step, run.loss, run.seconds, run.curve = (state[key] for key in ("step", "loss", "seconds", "curve"))
