"""From identity contexts to images: batching, precision, and what is computed once, not every step."""

import hashlib
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negfacediff_core.diffusion.acceleration import Accelerated, Network, choose
from negfacediff_core.diffusion.batch_size import CPU_BATCH, even_size, largest_batch
from negfacediff_core.diffusion.blocks import ProjectedContext
from negfacediff_core.diffusion.checkpoint import Generator
from negfacediff_core.diffusion.guidance import WEIGHTS, Term, guided, parse_curve, weight_over_time
from negfacediff_core.diffusion.precision import PRECISIONS, check_precision, products_in
from negfacediff_core.diffusion.rows import Rows, check_rows
from negfacediff_core.diffusion.samplers import SAMPLERS, EpsModel
from negfacediff_core.diffusion.transfer import Landing, to_device
from negfacediff_core.errors import ConfigError
from negfacediff_core.gpu_turns import turn_of
from negfacediff_core.images import to_uint8
from negfacediff_core.noise import gaussian
from negfacediff_core.stopping import heed

#: The weight that follows a curve of one's own.
PIECEWISE = "piecewise"

# Contexts are projected so many at a time, filled up with zeros, so that the kernels that round an identity's
# tokens do not depend on who shares its batch.
PROJECTED_AT_ONCE = 8
# Images are decoded so many at a time: the decoder's maps are the largest, and gain nothing from more.
DECODED_AT_ONCE = {"cpu": 8, "cuda": 32}


@dataclass(frozen=True)
class SamplerSettings:
    """How a latent is sampled: the sampler, its options (each reads its own) and the guidance.

    The options are those of the functions in `samplers`. `w` is the weight of the negatives, `weight` how it
    moves over the timesteps: a name in WEIGHTS or "piecewise", which follows `curve`. `cfg` is the weight of
    classifier-free guidance. Outside `interval`, of t / T, neither is applied.
    """

    sampler: str = "ddim"
    steps: int = 200
    eta: float = 0.0
    spacing: str = "karras"
    ddim_alpha: str = "exact"
    final_noise: str = "exact"
    w: float = 0.5
    weight: str = "constant"
    curve: str = ""
    cfg: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)


class Samples(NamedTuple):
    """`images` `(N, H, W, 3)` uint8 RGB, and `clipped` `(N,)` float32.

    `clipped` is the share of the decoder's values that lay outside [-1, 1]; NaN marks an image of which a
    value, or one of its latent, is not finite, and whose pixels mean nothing.
    """

    images: NDArray[np.uint8]
    clipped: NDArray[np.float32]


class SamplingEngine:
    """A generator made ready to sample on the device that it was loaded onto.

    Noise depends on (seed, identity, replicate, step) alone, and every batch of a call is filled up to one
    shape: images are the same, bit for bit on a CPU, whoever else is in a call of so many. Another batch size
    changes them by rounding alone. Where CUDA runs out of memory, the batch is halved and the engine goes on.

    `batch_size` 0 is the device's default on a CPU, and on a GPU the largest that fits, found in the first
    call; the attribute of that name then tells it. `precision` is a row of `PRECISIONS`, `acceleration` one
    of `ACCELERATIONS` or `auto`. Threads may share an engine: on a GPU they take turns. Raises `ConfigError`
    for unknown settings, and those that the generator or its device cannot meet.
    """

    def __init__(
        self,
        generator: Generator,
        settings: SamplerSettings,
        batch_size: int = 0,
        precision: str = "fp32",
        acceleration: str = "auto",
    ):
        _check_settings(generator, settings, batch_size)
        self.device = generator.unet.image_proj.weight.device
        check_precision(precision, self.device)
        self.generator = generator
        self.settings = settings
        self.precision = precision
        self.curve = parse_curve(settings.curve) if settings.weight == PIECEWISE else WEIGHTS[settings.weight]
        self.batch_size = batch_size or (0 if self.device.type == "cuda" else CPU_BATCH)
        self.dtype = PRECISIONS[precision].dtype
        # In 16 bits the weights are too: reading them is what small batches wait for.
        same = self.dtype == generator.unet.dtype
        unet = generator.unet if same else deepcopy(generator.unet).to(self.dtype)
        # The layout that tensor cores and fused attention read; values stay, so that sharing does no harm.
        self.unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.decoder = generator.decoder.in_precision(self.dtype)
        ways = choose(acceleration, self.device)
        self._searched = 0.0
        self.network = Accelerated(self.unet, ways, PRECISIONS[precision].tolerance)
        #: Held while a GPU samples: graphs, and the number format of products, are the device's.
        self.turn = turn_of(self.device)

    @property
    def warm_up(self) -> float:
        """Seconds that calls of `sample` spent on captures, compilations and the search for a batch size."""
        return self.network.warm_up + self._searched

    def needs(self, negatives: int) -> str:
        """What decides how many images a device holds, for a batch size to be remembered by.

        `negatives` is their number for each image.
        """
        weights = (*self.unet.named_parameters(), *self.decoder.named_parameters())
        shapes = [self.generator.latent_shape, *((name, tuple(weight.shape)) for name, weight in weights)]
        network = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
        contexts = 1 + (negatives if self.settings.w else 0) + bool(self.settings.cfg)
        return f"network {network}, {self.precision}, {self.network.way}, {contexts} contexts an image"

    @torch.inference_mode()
    def sample(
        self,
        contexts: NDArray[np.float32] | None,
        negatives: NDArray[np.float32] | None,
        shares: NDArray[np.float32] | None,
        identities: NDArray[np.int64],
        replicates: NDArray[np.int64],
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> Samples:
        """Make one image for each row.

        `contexts` are `(N, context width)` float32, one row an image (None: the empty context); `negatives`
        `(N, K, context width)` are pushed away from with the `shares` `(N, K)` of the weight w (None: no
        negative); `identities` and `replicates` are `(N,)` integers in [0, 2^32). `progress` is called after
        each batch with the number of images done. Raises `ContextsError` for arrays that do not fit together,
        or are not finite.
        """
        rows = Rows(contexts, negatives, shares, np.asarray(identities), np.asarray(replicates))
        check_rows(rows, self.generator.context_width, self.settings.w)
        side, count = self.generator.image_size, len(rows.identities)
        result = Samples(np.empty((count, side, side, 3), np.uint8), np.empty(count, np.float32))

        def keep(start: int, stop: int, images: Landing, clipped: Landing) -> None:
            result.images[start:stop] = images.wait()[: stop - start]
            result.clipped[start:stop] = clipped.wait()[: stop - start]
            if progress is not None:
                progress(stop)

        with self.turn, products_in(self.precision, self.device):
            if not self.batch_size:
                begun = time.perf_counter()
                self.batch_size = largest_batch(lambda size: self._try(rows, size), self.device)
                self._searched += time.perf_counter() - begun
            self._in_batches(rows, seed, keep)
        return result

    def _in_batches(self, rows: Rows, seed: int, keep: Callable[[int, int, Landing, Landing], None]) -> None:
        """Make every batch; one is copied to the host while the device works on the next."""
        count, done = len(rows.identities), 0
        size = even_size(count, self.batch_size)
        before: tuple[int, int, Landing, Landing] | None = None
        while done < count:
            stop = min(done + size, count)
            try:
                made = self._make(rows.filled(done, size), seed)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                made = None  # the memory is given back once the error is gone
            if made is None:
                self._halve(size)
                size = even_size(count - done, self.batch_size)
                continue
            if before is not None:
                keep(*before)
            before = (done, stop, *made)
            done = stop
        if before is not None:
            keep(*before)

    def _halve(self, size: int) -> None:
        self.batch_size = size // 2
        self.network.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _make(self, rows: Rows, seed: int) -> tuple[Landing, Landing]:
        """Sample and decode one batch: uint8 images and their clipped shares, on their way to the host."""
        images, clipped = [], []
        for latents in self._latents(rows, seed).split(DECODED_AT_ONCE[self.device.type]):
            decoded = self.decoder(latents)
            share = (decoded.abs() > 1.0).float().mean(dim=(1, 2, 3))
            # the codebook has a code for everything: what is not finite is not so any more behind it
            finite = latents.isfinite().flatten(1).all(dim=1) & decoded.isfinite().flatten(1).all(dim=1)
            clipped.append(share.where(finite, torch.nan))
            images.append(to_uint8(decoded.nan_to_num()))
        return Landing(torch.cat(images)), Landing(torch.cat(clipped))

    def _latents(self, rows: Rows, seed: int) -> Tensor:
        """Sample one batch of latents `(N, *latent shape)` float32."""
        schedule, shape = self.generator.schedule, self.generator.latent_shape
        identities = to_device(rows.identities.astype(np.int64), self.device)
        replicates = to_device(rows.replicates.astype(np.int64), self.device)

        def noise(step: int) -> Tensor:
            return gaussian(seed, identities, replicates, step, shape, self.device)

        sampler = SAMPLERS[self.settings.sampler]
        options = {name: getattr(self.settings, name) for name in sampler.options}
        eps_model = self._eps_model(rows, self.network)
        start = noise(schedule.T)
        return sampler.sample(eps_model, start, schedule, noise, callback=_between_steps, **options)

    def _eps_model(self, rows: Rows, network: Network, always: bool = False) -> EpsModel:
        """Project each row's context, and what it is guided away from; every distinct vector once.

        With `always` all terms have a weight at each timestep.
        """
        settings, T, count = self.settings, self.generator.schedule.T, len(rows.identities)
        curve, interval = (WEIGHTS["constant"], (0.0, 1.0)) if always else (self.curve, settings.interval)
        if rows.contexts is None:
            return guided(network, self.unet.project_empty(count))
        vectors = rows.contexts[:, None]
        if rows.negatives is not None and settings.w != 0.0:
            vectors = np.concatenate([vectors, rows.negatives], axis=1)
        distinct, indices = np.unique(vectors.reshape(-1, vectors.shape[2]), axis=0, return_inverse=True)
        projected = self._project(distinct)
        where = to_device(indices.reshape(vectors.shape[:2]), self.device)
        context, *negatives = (projected.take(column) for column in where.unbind(dim=1))
        terms = []
        if negatives and rows.shares is not None:
            weight = weight_over_time(settings.w, T, curve, interval)
            shares = to_device(rows.shares, self.device).unbind(dim=1)
            terms = [Term(away, weight, share) for away, share in zip(negatives, shares, strict=True)]
        if settings.cfg != 0.0:
            weight = weight_over_time(settings.cfg, T, interval=interval)
            all_of_it = torch.ones(count, device=self.device)
            terms.append(Term(self.unet.project_empty(count), weight, all_of_it))
        return guided(network, context, terms)

    def _project(self, vectors: NDArray[np.float32]) -> ProjectedContext:
        """Project `(K, context width)`, and zeros that nobody asks for."""
        missing = -len(vectors) % PROJECTED_AT_ONCE
        filled = to_device(np.pad(vectors, ((0, missing), (0, 0))), self.device)
        first, *others = (self.unet.project_context(some) for some in filled.split(PROJECTED_AT_ONCE))
        return first.concat(*others)

    def _try(self, rows: Rows, size: int) -> None:
        """Do what takes the most memory of a batch: one evaluation with all terms, and a decoding."""
        x = torch.zeros(size, *self.generator.latent_shape, device=self.device)
        eps_model = self._eps_model(rows.filled(0, size), self.network.eager, always=True)
        eps_model(x, self.generator.schedule.T - 1)
        self.decoder(x[: DECODED_AT_ONCE[self.device.type]])


def _between_steps(done: int, t: int, x: Tensor) -> None:
    heed()


def _check_settings(generator: Generator, settings: SamplerSettings, batch_size: int) -> None:
    for name, value, table in (
        ("sampler", settings.sampler, SAMPLERS),
        ("weight", settings.weight, (*WEIGHTS, PIECEWISE)),
    ):
        if value not in table:
            raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(table)}.")
    if settings.cfg and not generator.unet.learn_empty_context:
        raise ConfigError(
            f"classifier-free guidance of weight {settings.cfg:g} needs a generator that learned an "
            f"empty context; {generator.folder} did not: set cfg to 0."
        )
    if batch_size < 0:
        raise ConfigError(f"batch_size is {batch_size}; it must be positive, or 0 for the device's default.")
