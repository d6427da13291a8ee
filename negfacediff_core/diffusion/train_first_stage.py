"""Training of the demo pack's VQ autoencoder: 64x64 images to normalised 3x16x16 latents."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from negfacediff_core.diffusion.first_stage import FirstStageSettings, VQDecoder, VQEncoder
from negfacediff_core.diffusion.training import (
    CHECKPOINT_NAME,
    CURVE_NAME,
    Progress,
    State,
    check_origin,
    cosine_rate,
    descend,
    fast_bfloat16,
    load_state,
    optimiser_for,
    seeded,
    smoothed,
    to_planes,
    write_curve,
)
from negfacediff_core.errors import ConfigError
from negfacediff_core.tensor_files import write_tensors

# The f = 4 autoencoder of the demo pack. At full resolution a block of 32 channels costs 151 MFLOP an
# image, more than all that runs at the latent resolution: so one block a resolution and no widening.
DEMO_FIRST_STAGE = FirstStageSettings(ch=32, ch_mult=(1, 1, 1), num_res_blocks=0, n_embed=4096)
MOMENT_IMAGES = 4096  # images, evenly spaced, over which the latents' mean and deviation are taken at the end


@dataclass(frozen=True)
class FirstStageTraining:
    """What training does; its result is a function of these, the architecture and the images."""

    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 2e-3  # at its peak, after the warm-up
    warmup: int = 100  # steps
    clip: float = 1.0  # norm of the gradients
    quantise_from: float = 0.2  # share of the steps after which the decoder is given codes instead of latents
    commitment: float = 0.25  # weight of |z - code|^2, in units of the latents' variance
    gradient: float = 1.0  # weight of the absolute differences of image gradients, at two scales
    code_decay: float = 0.99  # of the running means that are the codes
    revive_every: int = (
        50  # steps; codes that got under `revive_below` of an even share start anew at a latent
    )
    revive_below: float = 0.02
    seed: int = 1
    record_every: int = 20  # steps between rows of the curve
    checkpoint_every: int = 200


class CodebookStatistics(nn.Module):
    """Running counts and sums of the latents that each code is nearest to; a code is the mean of its latents.

    This is the exponential-moving-average form of VQ-VAE (arXiv 1711.00937, appendix A.1): N <- d N + (1 - d)
    n, m <- d m + (1 - d) sum z, e = m / N.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, width))

    def start(self, codes: nn.Embedding, latents: Tensor) -> None:
        """Put every code on a random one of the latents `(P, width)`."""
        rows = torch.randint(len(latents), (codes.num_embeddings,))
        self._place(codes, torch.ones_like(self.counts, dtype=torch.bool), latents[rows])

    def update(self, codes: nn.Embedding, latents: Tensor, nearest: Tensor, decay: float) -> None:
        """Follow latents `(P, width)` whose nearest codes are `nearest` `(P,)`."""
        fresh_counts = torch.zeros_like(self.counts).index_add_(0, nearest, torch.ones(len(nearest)))
        fresh_sums = torch.zeros_like(self.sums).index_add_(0, nearest, latents)
        self.counts.lerp_(fresh_counts, 1 - decay)
        self.sums.lerp_(fresh_sums, 1 - decay)
        used = self.counts > 1e-3
        codes.weight.data[used] = self.sums[used] / self.counts[used, None]

    def revive(self, codes: nn.Embedding, latents: Tensor, share: float) -> None:
        """Restart codes that won less than `share` of an even share, each at a random one of the latents."""
        dead = self.counts < share * self.counts.mean()
        self._place(codes, dead, latents[torch.randint(len(latents), (int(dead.sum()),))])

    def _place(self, codes: nn.Embedding, where: Tensor, latents: Tensor) -> None:
        even = latents.new_tensor(max(float(self.counts.mean()), 1.0))
        codes.weight.data[where] = latents
        self.counts[where] = even
        self.sums[where] = latents * even


class _Autoencoder(nn.Module):
    """Encoder, normalisation and decoder, as they are trained.

    The normalisation stands between encoder and codebook from the first step, so that quantisation happens in
    latents of unit deviation throughout; once trained it is folded into the encoder and nothing else has to
    change.
    """

    def __init__(self, architecture: FirstStageSettings):
        super().__init__()
        self.encoder = VQEncoder(architecture)
        self.decoder = VQDecoder(architecture)
        self.decoder.quantize.requires_grad_(False)  # codes are running means, not descended
        self.normalise = nn.BatchNorm2d(architecture.embed_dim, affine=False, track_running_stats=False)
        self.statistics = CodebookStatistics(architecture.n_embed, architecture.embed_dim)

    def encode(self, images: Tensor) -> Tensor:
        """Normalised latents in float32, whatever the precision of the convolutions."""
        return self.normalise(self.encoder(images).float())


def train_first_stage(
    images: NDArray[np.uint8],
    held_out: NDArray[np.uint8],
    folder: Path,
    training: FirstStageTraining = FirstStageTraining(),
    architecture: FirstStageSettings = DEMO_FIRST_STAGE,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the autoencoder on `(N, S, S, 3)` uint8 images; continue from a checkpoint in `folder`.

    L = |x - x'| + a |grad x - grad x'| + b |z - e|^2, with a straight-through estimate past the codes e
    (VQ-VAE, arXiv 1711.00937; no adversarial part). The encoder's latents are normalised to zero mean and
    unit deviation a channel over `images`, so that the diffusion needs no scale factor. An interrupted run
    that is continued equals an uninterrupted one bit for bit on one machine. `load_first_stage(folder)`
    returns what was trained.

    Returns `psnr` (dB, on the whole of `held_out`, through the codes), `psnr_unquantised`, `codes_used`
    (share of the codes that `held_out` needs), `step`, `seconds`. Raises ConfigError if a checkpoint
    contradicts the settings.
    """
    if len(images) < training.batch_size or len(held_out) == 0:
        raise ConfigError(
            f"The first stage needs at least one batch of {training.batch_size} images and a held-out image; "
            f"got {len(images)} and {len(held_out)}. Render more, or lower the batch size."
        )
    with seeded(training.seed, 0):
        model = _Autoencoder(architecture)
    optimiser = optimiser_for(nn.ModuleList([model.encoder, model.decoder]), training.learning_rate, 1e-4)
    origin = {
        "architecture": architecture.to_config(),
        "training": asdict(training),
        "images": list(images.shape),
    }
    path = folder / CHECKPOINT_NAME
    step, seconds, loss = 0, 0.0, 0.0
    curve: list[dict[str, float]] = []
    if path.exists():
        state = load_state(path)
        check_origin(state, origin, path)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, seconds, loss, curve = (state[key] for key in ("step", "seconds", "loss", "curve"))

    started = time.monotonic() - seconds
    while step < training.steps:
        loss = smoothed(loss, _train_step(model, optimiser, images, training, step), step)
        step += 1
        if progress:
            progress(step, training.steps, loss)
        if step % training.record_every == 0:
            curve.append({"step": step, "loss": loss})
        if step % training.checkpoint_every == 0 or step == training.steps:
            seconds = time.monotonic() - started
            state = {"origin": origin, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
            write_tensors(path, {**state, "step": step, "seconds": seconds, "loss": loss, "curve": curve})
            write_curve(curve, folder / CURVE_NAME)

    model.eval()
    mean, deviation = latent_moments(model.encoder, images[:: max(1, len(images) // MOMENT_IMAGES)])
    fold_normalisation(model.encoder.quant_conv, mean, deviation)
    metrics = {
        **reconstruction_figures(model.encoder, model.decoder, held_out),
        "step": step,
        "seconds": seconds,
    }
    weights = {"encoder": model.encoder.state_dict(), "decoder": model.decoder.state_dict()}
    write_tensors(
        folder / "first_stage.pt", {"settings": architecture.to_config(), "metrics": metrics, **weights}
    )
    return metrics


def load_first_stage(folder: Path) -> tuple[VQEncoder, VQDecoder, State]:
    """Read what `train_first_stage` left in `folder`: encoder, decoder and figures. Raises WeightsError."""
    state = load_state(folder / "first_stage.pt")
    settings = FirstStageSettings.from_config(state["settings"])
    with seeded(0, 0):
        encoder, decoder = VQEncoder(settings).eval(), VQDecoder(settings).eval()
    encoder.load_state_dict(state["encoder"])
    decoder.load_state_dict(state["decoder"])
    return encoder, decoder, state["metrics"]


def fold_normalisation(projection: nn.Conv2d, mean: Tensor, deviation: Tensor) -> None:
    """Fold (z - mean) / deviation, `(C,)` each, into the 1x1 convolution whose output is z."""
    with torch.no_grad():
        projection.weight.div_(deviation[:, None, None, None])
        assert projection.bias is not None
        projection.bias.sub_(mean).div_(deviation)


def latent_moments(encoder: VQEncoder, images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of `(N, S, S, 3)` uint8 images, `(C,)` float32 each."""
    total = torch.zeros(encoder.settings.embed_dim, dtype=torch.float64)
    squares, pixels = total.clone(), 0
    with torch.no_grad():
        for batch in _batches(images):
            latents = encoder(batch).double()
            total += latents.sum((0, 2, 3))
            squares += latents.square().sum((0, 2, 3))
            pixels += latents[:, 0].numel()
    mean = total / pixels
    return mean.float(), (squares / pixels - mean.square()).sqrt().float()


def reconstruct(
    encoder: VQEncoder, decoder: VQDecoder, images: NDArray[np.uint8], quantize: bool = True
) -> Tensor:
    """Encode and decode `(N, S, S, 3)` uint8 images: `(N, 3, S, S)` float32, clipped to [-1, 1]."""
    with torch.inference_mode():
        parts = [decoder(encoder(batch), quantize=quantize) for batch in _batches(images)]
    return torch.cat(parts).clamp_(-1, 1)


def reconstruction_figures(
    encoder: VQEncoder, decoder: VQDecoder, images: NDArray[np.uint8]
) -> dict[str, float]:
    """PSNR in dB on `(N, S, S, 3)` uint8 images with and without codes, and the share of codes used."""
    target = to_planes(images)
    figures = {}
    for name, quantize in (("psnr", True), ("psnr_unquantised", False)):
        error = F.mse_loss(reconstruct(encoder, decoder, images, quantize), target)
        figures[name] = float(10 * torch.log10(4 / error))  # the peak is 2: pixels lie in [-1, 1]
    with torch.inference_mode():
        used = torch.cat([decoder.quantize.nearest(encoder(batch)).flatten() for batch in _batches(images)])
    figures["codes_used"] = used.unique().numel() / decoder.settings.n_embed
    return figures


def _batches(images: NDArray[np.uint8], size: int = 64) -> Iterator[Tensor]:
    for start in range(0, len(images), size):
        yield to_planes(images[start : start + size])


def _train_step(
    model: _Autoencoder,
    optimiser: torch.optim.Optimizer,
    images: NDArray[np.uint8],
    training: FirstStageTraining,
    step: int,
) -> float:
    """One step on a batch that depends on (seed, step) alone; returns the loss."""
    first_quantised = int(training.quantise_from * training.steps)
    with seeded(training.seed, step + 1):
        rows = torch.randint(len(images), (training.batch_size,))
        batch = to_planes(images[rows.numpy()])
        mirrored = torch.rand(len(batch)) < 0.5
        batch[mirrored] = batch[mirrored].flip(3)
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            latents = model.encode(batch)
            codes = _follow(model, latents.detach(), training, step - first_quantised)
            # straight through: the decoder reads the codes, the encoder gets the decoder's gradient as it is
            read = latents if codes is None else latents + (codes - latents).detach()
            decoded = model.decoder(read, quantize=False).float()
    loss = _image_loss(decoded, batch, training.gradient)
    if codes is not None:
        loss = loss + training.commitment * F.mse_loss(latents, codes)
    rate = training.learning_rate * cosine_rate(step, training.steps, training.warmup)
    descend(optimiser, loss, rate, training.clip)
    return loss.item()


def _follow(model: _Autoencoder, latents: Tensor, training: FirstStageTraining, age: int) -> Tensor | None:
    """The codes of `latents`, after the codebook has followed them; None while `age` (steps) is negative."""
    if age < 0:
        return None
    codebook, pixels = model.decoder.quantize, latents.permute(0, 2, 3, 1).flatten(0, 2)
    if age == 0:
        model.statistics.start(codebook.embedding, pixels)
    nearest = codebook.nearest(latents)
    model.statistics.update(codebook.embedding, pixels, nearest.flatten(), training.code_decay)
    if age % training.revive_every == 0:
        model.statistics.revive(codebook.embedding, pixels, training.revive_below)
    return codebook.embedding(nearest).permute(0, 3, 1, 2).contiguous()


def _image_loss(decoded: Tensor, target: Tensor, gradient: float) -> Tensor:
    """|x - x'|, and weighted by `gradient` the absolute differences of image gradients at two scales."""
    difference = decoded - target
    loss = difference.abs().mean()
    for scale in (1, 2):
        scaled = F.avg_pool2d(difference, scale) if scale > 1 else difference
        loss = loss + gradient * (scaled.diff(dim=2).abs().mean() + scaled.diff(dim=3).abs().mean()) / 2
    return loss
