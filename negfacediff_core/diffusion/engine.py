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
from negfacediff_core.diffusion.guidance import WEIGHTS, negative_guidance
from negfacediff_core.diffusion.samplers import SAMPLERS
from negfacediff_core.errors import ConfigError, ContextsError
from negfacediff_core.images import to_uint8
from negfacediff_core.noise import gaussian

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# images a batch where the caller does not choose: a GPU gains from larger ones than a CPU
DEFAULT_BATCH = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class SamplerSettings:
    """How a latent is sampled: the sampler, its options (each reads its own) and the negative weight.

    `weight` names how `w` moves over the timesteps. The options are those of the functions in `samplers`.
    """

    sampler: str = "ddim"
    steps: int = 200
    eta: float = 0.0
    ddim_alpha: str = "exact"
    final_noise: str = "exact"
    w: float = 0.5
    weight: str = "constant"


class Samples(NamedTuple):
    """`images` `(N, H, W, 3)` uint8 RGB, and `clipped` `(N,)` float32.

    `clipped` is the share of the decoder's values that lay outside [-1, 1]; NaN marks an image with values
    that are not finite, whose pixels mean nothing.
    """

    images: NDArray[np.uint8]
    clipped: NDArray[np.float32]


class _Rows(NamedTuple):
    """What the images of a batch are made from, one row an image."""

    contexts: NDArray[np.float32] | None
    negatives: NDArray[np.float32] | None
    identities: NDArray[np.int64]
    replicates: NDArray[np.int64]

    def part(self, start: int, stop: int) -> "_Rows":
        rows = slice(start, stop)
        return _Rows(
            None if self.contexts is None else self.contexts[rows],
            None if self.negatives is None else self.negatives[rows],
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
            ("weight", settings.weight, WEIGHTS),
            ("precision", precision, PRECISIONS),
        ):
            if value not in table:
                raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(table)}.")
        if batch_size < 0:
            raise ConfigError(
                f"batch_size is {batch_size}; it must be positive, or 0 for the device's default."
            )
        self.generator = generator
        self.settings = settings
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
        identities: NDArray[np.int64],
        replicates: NDArray[np.int64],
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> Samples:
        """Make one image for each row.

        `contexts` and `negatives` are `(N, context width)` float32, one row an image (None: no context, no
        negative); `identities` and `replicates` are `(N,)` integers in [0, 2^32). `progress` is called after
        each batch with the number of images done. Raises `ContextsError` for arrays that do not fit together,
        or are not finite.
        """
        rows = _Rows(contexts, negatives, np.asarray(identities), np.asarray(replicates))
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
        weight = WEIGHTS[self.settings.weight](self.settings.w, schedule.T)
        eps_model = negative_guidance(self.unet, *self._project(rows), weight)
        return sampler.sample(eps_model, noise(schedule.T), schedule, noise, **options)

    def _project(self, rows: _Rows) -> tuple[ProjectedContext, ProjectedContext | None]:
        """Project every distinct vector of a batch once, and hand each row its own."""
        count = len(rows.identities)
        if rows.contexts is None:
            return self.unet.project_empty(count), None
        negatives = rows.negatives if self.settings.w != 0.0 else None
        vectors = rows.contexts if negatives is None else np.concatenate([rows.contexts, negatives])
        distinct, indices = np.unique(vectors, axis=0, return_inverse=True)
        projected = self.unet.project_context(torch.as_tensor(distinct, device=self.device))
        where = torch.as_tensor(indices, device=self.device)
        return projected.take(where[:count]), None if negatives is None else projected.take(where[count:])

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode `(N, *latent shape)` to `(N, 3, H, W)` float32; the codebook search stays in float32."""
        decoder = self.generator.decoder
        codes = decoder.quantize(latents)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return decoder(codes, quantize=False).float()

    def _check(self, rows: _Rows) -> None:
        expected = (len(rows.identities), self.generator.context_width)
        if len(rows.replicates) != expected[0]:
            raise ContextsError(
                f"{expected[0]} identities and {len(rows.replicates)} replicates do not pair up."
            )
        for name, vectors in (("contexts", rows.contexts), ("negatives", rows.negatives)):
            if vectors is None:
                continue
            if vectors.shape != expected:
                raise ContextsError(f"The {name} have shape {vectors.shape}; these images need {expected}.")
            unusable = ~np.isfinite(vectors).all(axis=1)
            if unusable.any():
                raise ContextsError(
                    f"The {name} hold NaN or infinity, first for identity {rows.identities[unusable][0]}."
                )
        if rows.negatives is None and self.settings.w != 0.0:
            raise ContextsError(
                f"The negative weight is {self.settings.w} but no negatives came; set w to 0."
            )
        if rows.negatives is not None and rows.contexts is None:
            raise ContextsError("Negatives came without contexts; give both or neither.")
