"""From identity contexts to images: batching, precision, and what is computed once, not every step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negfacediff_core.diffusion.blocks import ProjectedContext
from negfacediff_core.diffusion.checkpoint import Generator
from negfacediff_core.diffusion.guidance import WEIGHTS, Term, guided, parse_curve, weight_over_time
from negfacediff_core.diffusion.samplers import SAMPLERS
from negfacediff_core.errors import ConfigError, ContextsError
from negfacediff_core.images import to_uint8
from negfacediff_core.noise import gaussian

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: The weight that follows a curve of one's own.
PIECEWISE = "piecewise"

# images a batch where the caller does not choose: a GPU gains from larger ones than a CPU
DEFAULT_BATCH = {"cpu": 64, "cuda": 256}


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
    ddim_alpha: str = "exact"
    final_noise: str = "exact"
    w: float = 0.5
    weight: str = "constant"
    curve: str = ""
    cfg: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)


class Samples(NamedTuple):
    """`images` `(N, H, W, 3)` uint8 RGB, and `clipped` `(N,)` float32.

    `clipped` is the share of the decoder's values that lay outside [-1, 1]; NaN marks an image with values
    that are not finite, whose pixels mean nothing.
    """

    images: NDArray[np.uint8]
    clipped: NDArray[np.float32]


class _Rows(NamedTuple):
    """What the images of a batch are made from, one row an image."""

    contexts: NDArray[np.float32] | None  # (N, W)
    negatives: NDArray[np.float32] | None  # (N, K, W)
    shares: NDArray[np.float32] | None  # (N, K)
    identities: NDArray[np.int64]
    replicates: NDArray[np.int64]

    def part(self, start: int, stop: int) -> "_Rows":
        rows = slice(start, stop)
        return _Rows(
            None if self.contexts is None else self.contexts[rows],
            None if self.negatives is None else self.negatives[rows],
            None if self.shares is None else self.shares[rows],
            self.identities[rows],
            self.replicates[rows],
        )


class SamplingEngine:
    """A generator made ready to sample on the device that it was loaded onto.

    Noise depends on (seed, identity, replicate, step) alone, so batch size and order change an image only
    through the rounding of batched arithmetic. Where CUDA runs out of memory, the batch is halved and the
    engine goes on. `batch_size` 0 means the device's default. Raises `ConfigError` for unknown settings.
    """

    def __init__(
        self, generator: Generator, settings: SamplerSettings, batch_size: int = 0, precision: str = "fp32"
    ):
        for name, value, table in (
            ("sampler", settings.sampler, SAMPLERS),
            ("weight", settings.weight, (*WEIGHTS, PIECEWISE)),
            ("precision", precision, PRECISIONS),
        ):
            if value not in table:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(table)}.")
        if settings.cfg and not generator.unet.learn_empty_context:
            raise ConfigError(
                f"classifier-free guidance of weight {settings.cfg:g} needs a generator that learned an "
                f"empty context; {generator.folder} did not: set cfg to 0."
            )
        if batch_size < 0:
            raise ConfigError(
                f"batch_size is {batch_size}; it must be positive, or 0 for the device's default."
            )
        self.generator = generator
        self.settings = settings
        self.curve = parse_curve(settings.curve) if settings.weight == PIECEWISE else WEIGHTS[settings.weight]
        self.device = generator.unet.image_proj.weight.device
        self.batch_size = batch_size or DEFAULT_BATCH.get(self.device.type, DEFAULT_BATCH["cpu"])
        self.dtype = PRECISIONS[precision]
        # in bfloat16 the weights are too: reading them is what small batches wait for
        same = self.dtype == generator.unet.dtype
        self.unet = generator.unet if same else copy.deepcopy(generator.unet).to(self.dtype)

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
        rows = _Rows(contexts, negatives, shares, np.asarray(identities), np.asarray(replicates))
        self._check(rows)
        side, count = self.generator.image_size, len(rows.identities)
        images = np.empty((count, side, side, 3), np.uint8)
        clipped = np.empty(count, np.float32)
        done = 0
        while done < count:
            stop = min(done + self.batch_size, count)
            try:
                images[done:stop], clipped[done:stop] = self._make(rows.part(done, stop), seed)
            except torch.OutOfMemoryError:
                if stop - done == 1:
                    raise
                self.batch_size = (stop - done) // 2
                torch.cuda.empty_cache()
                continue
            done = stop
            if progress is not None:
                progress(done)
        return Samples(images, clipped)

    def _make(self, rows: _Rows, seed: int) -> Samples:
        """Sample and decode one batch."""
        decoded = self._decode(self._latents(rows, seed))
        clipped = (decoded.abs() > 1.0).float().mean(dim=(1, 2, 3))
        clipped[~decoded.isfinite().all(dim=(1, 2, 3))] = torch.nan
        return Samples(to_uint8(decoded.nan_to_num()).cpu().numpy(), clipped.cpu().numpy())

    def _latents(self, rows: _Rows, seed: int) -> Tensor:
        """Sample one batch of latents `(N, *latent shape)` float32."""
        schedule, shape = self.generator.schedule, self.generator.latent_shape
        identities = torch.as_tensor(rows.identities, dtype=torch.int64, device=self.device)
        replicates = torch.as_tensor(rows.replicates, dtype=torch.int64, device=self.device)

        def noise(step: int) -> Tensor:
            return gaussian(seed, identities, replicates, step, shape, self.device)

        sampler = SAMPLERS[self.settings.sampler]
        options = {name: getattr(self.settings, name) for name in sampler.options}
        eps_model = guided(self.unet, *self._guidance(rows))
        return sampler.sample(eps_model, noise(schedule.T), schedule, noise, **options)

    def _guidance(self, rows: _Rows) -> tuple[ProjectedContext, list[Term]]:
        """Project each row's context, and what it is guided away from; every distinct vector once."""
        settings, T, count = self.settings, self.generator.schedule.T, len(rows.identities)
        if rows.contexts is None:
            return self.unet.project_empty(count), []
        vectors = rows.contexts[:, None]
        if rows.negatives is not None and settings.w != 0.0:
            vectors = np.concatenate([vectors, rows.negatives], axis=1)
        distinct, indices = np.unique(vectors.reshape(-1, vectors.shape[2]), axis=0, return_inverse=True)
        projected = self.unet.project_context(torch.as_tensor(distinct, device=self.device))
        where = torch.as_tensor(indices.reshape(vectors.shape[:2]), device=self.device)
        context, *negatives = (projected.take(column) for column in where.unbind(dim=1))
        weight = weight_over_time(settings.w, T, self.curve, settings.interval)
        shares = torch.as_tensor(rows.shares, device=self.device).unbind(dim=1) if negatives else ()
        terms = [Term(away, weight, share) for away, share in zip(negatives, shares, strict=True)]
        if settings.cfg != 0.0:
            all_of_it = torch.ones(count, device=self.device)
            empty = self.unet.project_empty(count)
            terms.append(
                Term(empty, weight_over_time(settings.cfg, T, interval=settings.interval), all_of_it)
            )
        return context, terms

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode `(N, *latent shape)` to `(N, 3, H, W)` float32; the codebook search stays in float32."""
        decoder = self.generator.decoder
        codes = decoder.quantize(latents)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return decoder(codes, quantize=False).float()

    def _check(self, rows: _Rows) -> None:
        count, width = len(rows.identities), self.generator.context_width
        if len(rows.replicates) != count:
            raise ContextsError(f"{count} identities and {len(rows.replicates)} replicates do not pair up.")
        negatives = 0 if rows.negatives is None else rows.negatives.shape[1]
        for name, values, expected in (
            ("contexts", rows.contexts, (count, width)),
            ("negatives", rows.negatives, (count, negatives, width)),
            ("shares", rows.shares, (count, negatives)),
        ):
            if values is None:
                continue
            if values.shape != expected:
                raise ContextsError(f"The {name} have shape {values.shape}; these images need {expected}.")
            unusable = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            if unusable.any():
                raise ContextsError(
                    f"The {name} hold NaN or infinity, first for identity {rows.identities[unusable][0]}."
                )
        if (rows.negatives is None) != (rows.shares is None):
            raise ContextsError("Negatives and their shares belong together; give both or neither.")
        if rows.negatives is None and self.settings.w != 0.0:
            raise ContextsError(
                f"The negative weight is {self.settings.w} but no negatives came; set w to 0."
            )
        if rows.negatives is not None and rows.contexts is None:
            raise ContextsError("Negatives came without contexts; give both or neither.")
