"""Training of an identity-conditioned generator (IDiff-Face, arXiv 2308.04995) on latents and contexts."""

import copy
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from negfacediff_core.diffusion.checkpoint import save_generator
from negfacediff_core.diffusion.first_stage import VQDecoder
from negfacediff_core.diffusion.guidance import guided
from negfacediff_core.diffusion.samplers import ddim
from negfacediff_core.diffusion.schedule import NoiseSchedule, schedule_from_config
from negfacediff_core.diffusion.train_first_stage import load_first_stage
from negfacediff_core.diffusion.training import (
    CHECKPOINT_NAME,
    CURVE_NAME,
    Progress,
    State,
    average_weights,
    check_origin,
    cosine_rate,
    descend,
    fast_bfloat16,
    load_state,
    optimiser_for,
    seeded,
    smoothed,
    write_curve,
)
from negfacediff_core.diffusion.training_set import (
    Batch,
    ContextDraws,
    TrainingSet,
    check_training_set,
    draw_batch,
    identity_means,
)
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.images import to_uint8
from negfacediff_core.tensor_files import write_tensors

# The demo pack's network: 3x16x16 latents, contexts of width 20. The keys are IDiff-Face's.
DEMO_NETWORK: dict[str, Any] = {
    "input_channels": 3,
    "initial_channels": 64,
    "channel_multipliers": [1, 1, 2],
    "is_attention": [False, False, True],
    "attention_heads": -1,
    "attention_head_channels": 32,
    "n_blocks_per_resolution": 1,
    "condition_type": "AdaGN",
    "is_context_conditional": True,
    "n_context_classes": 0,
    "context_input_channels": 20,
    "context_channels": 128,
    "learn_empty_context": True,
    "context_dropout_probability": 0.25,
}
# Cosine, because the linear schedule spends a third of 20 sampling steps where there is only noise.
DEMO_DIFFUSION: dict[str, Any] = {"T": 1000, "schedule_type": "cosine"}

GRID_STEPS = 20  # of DDIM, in the sample pictures
GRID_COLUMNS = 8  # samples a context in the sample pictures
HELD_OUT_BATCHES, HELD_OUT_BATCH = 4, 128


@dataclass(frozen=True)
class GeneratorTraining:
    """What training does; its result depends on these, the network, the schedule and the training set."""

    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 1e-3  # at its peak, after the warm-up; then it falls by a cosine
    warmup: int = 300  # steps
    weight_decay: float = 1e-3
    clip: float = 1.0  # norm of the gradients
    average_decay: float = 0.9995  # of the averaged weights, which are the ones to sample with
    min_snr: float = 5.0  # signal-to-noise ratio above which a timestep counts less (arXiv 2303.09556)
    draws: ContextDraws = field(default_factory=ContextDraws)
    seed: int = 2
    record_every: int = 20  # steps between rows of the curve
    checkpoint_every: int = 250
    evaluate_every: int = 1000  # steps between held-out losses and sample pictures


@dataclass
class _Run:
    """What a checkpoint restores. Random numbers are functions of (seed, step), so none of them is state."""

    live: ConditionalUNet
    average: ConditionalUNet
    optimiser: torch.optim.AdamW
    step: int
    loss: float
    seconds: float
    curve: list[dict[str, float]]


class _Forward:
    """The forward process, x_t = sqrt(ab[t]) x_0 + sqrt(1 - ab[t]) eps, and the weight of each timestep."""

    def __init__(self, diffusion: dict[str, Any], min_snr: float):
        self.schedule = schedule_from_config(diffusion)
        alpha_bars = self.schedule.alpha_bars
        snr = alpha_bars / (1 - alpha_bars)
        weights = snr.clamp(max=min_snr) / snr if min_snr > 0 else torch.ones_like(snr)
        self.signal, self.noise = alpha_bars.sqrt().float(), (1 - alpha_bars).sqrt().float()
        self.weights = weights.float()

    def loss(self, unet: ConditionalUNet, batch: Batch) -> Tensor:
        """Mean of w[t] |eps - eps_theta(x_t, t, c)|^2 over a batch of B, one t in each of B equal strata."""
        rows = len(batch.latents)
        t = ((torch.arange(rows) + torch.rand(rows)) / rows * self.schedule.T).long()
        eps = torch.randn_like(batch.latents)
        x = self.signal[t, None, None, None] * batch.latents + self.noise[t, None, None, None] * eps
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            predicted = unet(x, t, batch.contexts, batch.empty)
        error = (predicted.float() - eps).square().mean((1, 2, 3))
        return (self.weights[t] * error).mean()


def train_generator(
    data: TrainingSet,
    held_out: TrainingSet,
    decoder: VQDecoder,
    pictured: dict[str, NDArray[np.float32]],
    folder: Path,
    training: GeneratorTraining = GeneratorTraining(),
    network: dict[str, Any] = DEMO_NETWORK,
    diffusion: dict[str, Any] = DEMO_DIFFUSION,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the noise-prediction network; continue from the checkpoint in `folder` if there is one.

    The objective is |eps - eps_theta(x_t, t, c)|^2 with contextual partial dropout in the network (arXiv
    2308.04995) and contexts drawn as `ContextDraws` says. An interrupted run that is continued equals an
    uninterrupted one bit for bit on one machine with one number of threads. Beside the checkpoint stand
    `curve.csv` and, every `evaluate_every` steps, `samples-<step>.png`: for each name in `pictured` one row a
    context `(n, W)`, `GRID_COLUMNS` samples each.

    Returns `loss` (smoothed), `held_out_loss` (averaged weights, identities never trained on, their mean
    embeddings as contexts), `step`, `seconds`, `parameters`. Raises ConfigError if the sets do not fit the
    network or a checkpoint contradicts the settings.
    """
    for part in (data, held_out):
        check_training_set(part, network["context_input_channels"], network["input_channels"])
    forward = _Forward(diffusion, training.min_snr)
    run = _start(network, training)
    origin = {
        "network": network,
        "diffusion": diffusion,
        "training": {**asdict(training), "draws": training.draws._asdict()},
        "trained_on": list(data.latents.shape),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT_NAME
    if path.exists():
        _restore(run, load_state(path), origin, path)

    means = _means(data)
    started = time.monotonic() - run.seconds
    while run.step < training.steps:
        _train_step(run, forward, data, means, training)
        if progress:
            progress(run.step, training.steps, run.loss)
        last = run.step == training.steps
        evaluate = run.step % training.evaluate_every == 0 or last
        if run.step % training.record_every == 0 or evaluate:
            run.curve.append({"step": run.step, "loss": run.loss})
        if evaluate:
            run.curve[-1]["held_out_loss"] = held_out_loss(run.average, forward, held_out, training.seed)
            _picture(run, forward, decoder, pictured, folder, tuple(held_out.latents.shape[3:]))
        if run.step % training.checkpoint_every == 0 or last:
            run.seconds = time.monotonic() - started
            _save(run, origin, path)
            write_curve(run.curve, folder / CURVE_NAME)
    return {
        "loss": run.loss,
        "held_out_loss": held_out_loss(run.average, forward, held_out, training.seed),
        "step": run.step,
        "seconds": run.seconds,
        "parameters": sum(p.numel() for p in run.live.parameters()),
    }


def held_out_loss(unet: ConditionalUNet, forward: _Forward, held_out: TrainingSet, seed: int) -> float:
    """The training loss on fixed draws, with mean embeddings as contexts and nothing dropped."""
    with seeded(seed, 0), torch.inference_mode():
        draws = ContextDraws(own_image=0.0, perturbed=0.0, empty=0.0)
        batches = [
            draw_batch(held_out, _means(held_out), HELD_OUT_BATCH, draws) for _ in range(HELD_OUT_BATCHES)
        ]
        return float(np.mean([forward.loss(unet, batch).item() for batch in batches]))


def sample_latents(
    unet: ConditionalUNet, schedule: NoiseSchedule, contexts: NDArray[np.float32], shape: tuple[int, ...]
) -> Tensor:
    """DDIM samples, no negative, of `(n, W)` contexts: `(n, GRID_COLUMNS, *shape)`; a column shares noise."""
    with seeded(0, 0), torch.inference_mode():
        start = torch.randn(GRID_COLUMNS, *shape).repeat(len(contexts), 1, 1, 1)
        projected = unet.project_context(torch.from_numpy(contexts).repeat_interleave(GRID_COLUMNS, 0))
        eps_model = guided(unet, projected)
        latents = ddim(eps_model, start, schedule, lambda t: torch.zeros_like(start), GRID_STEPS)
    return latents.unflatten(0, (len(contexts), GRID_COLUMNS))


def load_trained(folder: Path) -> tuple[ConditionalUNet, State]:
    """The averaged network of the checkpoint in a training folder, and the `origin` it was started with."""
    state = load_state(folder / CHECKPOINT_NAME)
    with seeded(0, 0):
        unet = ConditionalUNet(**state["origin"]["network"])
    unet.load_state_dict(state["average"])
    return unet.eval(), state["origin"]


def export_generator(
    folder: Path,
    first_stage: Path,
    out: Path,
    conditioner_sha256: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a release folder (IDiff-Face layout) from the training folders of generator and first stage.

    Works on any checkpoint, also of a training that still runs. `conditioner_sha256` is the hash of the
    recogniser that made the contexts: evaluation refuses to be judged by it. Weights are rounded to `dtype`;
    loading gives float32.
    """
    unet, origin = load_trained(folder)
    encoder, decoder, _ = load_first_stage(first_stage)
    save_generator(
        out,
        unet,
        decoder,
        encoder,
        model=origin["network"],
        diffusion=origin["diffusion"],
        image_size=origin["trained_on"][-1] * decoder.settings.downsampling,
        dtype=dtype,
        conditioner_sha256=conditioner_sha256,
    )


def _means(data: TrainingSet) -> Tensor:
    return torch.from_numpy(identity_means(data.contexts.numpy()))


def _start(network: dict[str, Any], training: GeneratorTraining) -> _Run:
    with seeded(training.seed, 0):
        live = ConditionalUNet(**network)
    average = copy.deepcopy(live).eval().requires_grad_(False)
    optimiser = optimiser_for(live, training.learning_rate, training.weight_decay)
    return _Run(live.train(), average, optimiser, step=0, loss=0.0, seconds=0.0, curve=[])


def _train_step(
    run: _Run, forward: _Forward, data: TrainingSet, means: Tensor, training: GeneratorTraining
) -> None:
    """One step on a batch that depends on (seed, step) alone."""
    with seeded(training.seed, run.step + 1):
        batch = draw_batch(data, means, training.batch_size, training.draws)
        loss = forward.loss(run.live, batch)
    rate = training.learning_rate * cosine_rate(run.step, training.steps, training.warmup)
    descend(run.optimiser, loss, rate, training.clip)
    average_weights(run.average, run.live, run.step, training.average_decay)
    run.loss = smoothed(run.loss, loss.item(), run.step)
    run.step += 1


def _picture(
    run: _Run,
    forward: _Forward,
    decoder: VQDecoder,
    pictured: dict[str, NDArray[np.float32]],
    folder: Path,
    shape: tuple[int, ...],
) -> None:
    """Write samples of the averaged weights as one picture, a row a context, source after source."""
    if not pictured:
        return
    contexts = np.concatenate(list(pictured.values()))
    latents = sample_latents(run.average, forward.schedule, contexts, shape)
    with torch.inference_mode():
        images = to_uint8(decoder(latents.flatten(0, 1))).unflatten(0, latents.shape[:2]).numpy()
    rows, columns, height, width, _ = images.shape
    sheet = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    Image.fromarray(sheet).save(folder / f"samples-{run.step:06d}.png")


def _save(run: _Run, origin: dict[str, Any], path: Path) -> None:
    state = {
        "origin": origin,
        "live": run.live.state_dict(),
        "average": run.average.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "step": run.step,
        "loss": run.loss,
        "seconds": run.seconds,
        "curve": run.curve,
    }
    write_tensors(path, state)


def _restore(run: _Run, state: State, origin: dict[str, Any], path: Path) -> None:
    """Bring `run` to where `state` left it, after checking that it is the same training."""
    check_origin(state, origin, path)
    run.live.load_state_dict(state["live"])
    run.average.load_state_dict(state["average"])
    run.optimiser.load_state_dict(state["optimiser"])
    run.step, run.loss, run.seconds, run.curve = (state[key] for key in ("step", "loss", "seconds", "curve"))
