"""The published procedure in its straightforward form, which the engine is measured against.

Everything is float32, eager and synchronous. Contexts are projected by the network at every evaluation, the
positive and the negative prediction are two passes (arXiv 2508.09661), one identity is sampled at a time,
the codebook search builds the whole matrix of distances, and images are written before the next identity
begins. Weights, schedule, samplers and noise are this project's, so that the images must be the engine's.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from negfacediff_core.diffusion.checkpoint import Generator
from negfacediff_core.diffusion.first_stage import VQDecoder
from negfacediff_core.diffusion.precision import products_in
from negfacediff_core.diffusion.samplers import SAMPLERS
from negfacediff_core.diffusion.unet import ConditionalUNet
from negfacediff_core.noise import gaussian

#: Images of an identity in the published datasets: there they are one batch.
IMAGES = 50


class PlainNetwork:
    """The noise-prediction network, layer after layer, with the weights of `unet`; types CA and AdaGN."""

    def __init__(self, unet: ConditionalUNet):
        self.weights = {key: value.detach().contiguous() for key, value in unet.state_dict().items()}
        self.heads = {name: module.heads for name, module in unet.named_modules() if hasattr(module, "heads")}
        self.attentions = {name.rpartition(".")[0] for name in self.heads}
        self.stages = {path: len(getattr(unet, path)) for path in ("down", "up")}

    def __call__(self, x: Tensor, t: Tensor, contexts: Tensor) -> Tensor:
        """Predict the noise in latents `(N, C, H, W)` at timesteps `(N,)` for contexts `(N, width)`."""
        time = self._embed(t)
        context = self._linear("context_emb", contexts)
        h = self._convolve("image_proj", x, padding=1)
        skips = [h]
        for i in range(self.stages["down"]):
            h = self._stage(f"down.{i}", h, time, context)
            skips.append(h)
        h = self._residual("middle.res1", h, time, context)
        h = self._attend("middle.attn", h, context)
        h = self._residual("middle.res2", h, time, context)
        for i in range(self.stages["up"]):
            if f"up.{i}.conv.weight" not in self.weights:
                h = torch.cat([h, skips.pop()], dim=1)
            h = self._stage(f"up.{i}", h, time, context)
        return self._convolve("final", F.silu(self._norm("norm", h)), padding=1)

    def _parameters(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self._parameters(name))

    def _convolve(self, name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, *self._parameters(name), **options)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, *self._parameters(name))

    def _embed(self, t: Tensor) -> Tensor:
        half = self.weights["time_emb.lin1.weight"].shape[1] // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self._linear("time_emb.lin2", F.silu(self._linear("time_emb.lin1", waves)))

    def _stage(self, name: str, h: Tensor, time: Tensor, context: Tensor) -> Tensor:
        if f"{name}.conv.weight" in self.weights:
            if name.startswith("down"):
                return self._convolve(f"{name}.conv", h, stride=2, padding=1)
            return F.conv_transpose2d(h, *self._parameters(f"{name}.conv"), stride=2, padding=1)
        h = self._residual(f"{name}.res", h, time, context)
        return self._attend(f"{name}.attn", h, context) if f"{name}.attn" in self.attentions else h

    def _residual(self, name: str, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = self._convolve(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)), padding=1)
        steering = self._linear(f"{name}.time_emb.1", F.silu(time))
        if f"{name}.context_emb.1.weight" in self.weights:
            steering = steering + self._linear(f"{name}.context_emb.1", F.silu(context))
        scale, shift = (self._linear(f"{name}.{part}_emb", steering) for part in ("scale", "shift"))
        h = self._norm(f"{name}.norm2.norm", h)
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        h = self._convolve(f"{name}.conv2", F.silu(h), padding=1)
        return h + (self._convolve(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.weights else x)

    def _attend(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        if f"{name}.x_proj_in.weight" not in self.weights:
            own = self._norm(f"{name}.norm", x.flatten(2))
            return x + self._attention(f"{name}.attention", own, own).view(x.shape)
        h = self._convolve(f"{name}.x_proj_in", x).flatten(2)
        tokens = self._linear(f"{name}.c_proj_in", context).unflatten(1, (context.shape[1], -1))
        tokens = self._norm(f"{name}.c_norm", tokens)
        own = self._norm(f"{name}.x_norm", h)
        h = h + self._attention(f"{name}.self_attention", own, own)
        h = h + self._attention(f"{name}.cross_attention", self._norm(f"{name}.x_norm", h), tokens)
        wide = F.gelu(self._linear(f"{name}.ff.0", self._norm(f"{name}.x_norm", h).transpose(1, 2)))
        h = h + self._linear(f"{name}.ff.2", wide).transpose(1, 2)
        return x + self._convolve(f"{name}.x_proj_out", h.view(x.shape))

    def _attention(self, name: str, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            F.conv1d(y, *self._parameters(f"{name}.to_{part}")).unflatten(1, (self.heads[name], -1))
            for part, y in (("q", x), ("k", source), ("v", source))
        )
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(dim=-1)
        mixed = (v @ weights.transpose(2, 3)).flatten(1, 2)
        return F.conv1d(mixed, *self._parameters(f"{name}.proj_out"))


class PlainDecoder:
    """The first stage's decoder with its convolutions on repeated pixels and one matrix of distances."""

    def __init__(self, decoder: VQDecoder):
        self.codes = decoder.quantize.embedding.weight.detach()
        self.project = decoder.post_quant_conv
        self.decoder = copy.deepcopy(decoder.decoder)
        for level in self.decoder.up:
            if not isinstance(level.upsample, nn.Identity):
                level.upsample = nn.Sequential(nn.Upsample(scale_factor=2.0), level.upsample.conv)

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode `(N, embed_dim, h, w)` to `(N, 3, f h, f w)`."""
        pixels = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        squares = pixels.square().sum(1, keepdim=True) + self.codes.square().sum(1)
        nearest = (squares - 2 * pixels @ self.codes.T).argmin(dim=1)
        codes = self.codes[nearest].view(len(latents), *latents.shape[2:], -1).permute(0, 3, 1, 2)
        return self.decoder(self.project(codes.contiguous()))


class PlainSampler:
    """Samples identity after identity; `sampler` and `options` are a row of SAMPLERS and its options.

    On a GPU `products` says how float32 is multiplied: exactly ("fp32"), or in TF32 ("tf32").
    """

    def __init__(
        self, generator: Generator, sampler: str, w: float, products: str = "fp32", **options: float | str
    ):
        self.generator, self.sampler, self.w, self.options = generator, SAMPLERS[sampler], w, options
        self.network = PlainNetwork(generator.unet)
        self.decoder = PlainDecoder(generator.decoder)
        self.device = generator.unet.image_proj.weight.device
        self.products = products

    @torch.inference_mode()
    def latents(
        self,
        context: NDArray[np.float32],
        negative: NDArray[np.float32],
        identity: int,
        replicates: Sequence[int],
        seed: int,
    ) -> Tensor:
        """Sample the latents of one identity, with contexts `(width,)`, as one batch."""
        count = len(replicates)
        towards, away = (
            torch.as_tensor(vector, device=self.device).expand(count, -1) for vector in (context, negative)
        )

        def noise(step: int) -> Tensor:
            shape = self.generator.latent_shape
            return gaussian(seed, [identity] * count, list(replicates), step, shape, self.device)

        def eps_model(x: Tensor, t: int) -> Tensor:
            times = torch.full((count,), t, device=self.device)
            wanted, unwanted = self.network(x, times, towards), self.network(x, times, away)
            return (1 + self.w) * wanted - self.w * unwanted

        schedule = self.generator.schedule
        with products_in(self.products, self.device):
            return self.sampler.sample(eps_model, noise(schedule.T), schedule, noise, **self.options)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode latents to `(N, H, W, 3)` uint8 on the host."""
        with products_in(self.products, self.device):
            images = ((self.decoder(latents) + 1) * 127.5).round().clamp(0, 255)
        return images.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    def write(
        self,
        folder: Path,
        contexts: NDArray[np.float32],
        negatives: NDArray[np.float32],
        images: int = IMAGES,
        seed: int = 0,
    ) -> NDArray[np.uint8]:
        """Sample `images` of every identity and write each as a PNG file.

        `contexts` and `negatives` are `(identities, width)`; the result is `(identities, images, H, W, 3)`.
        """
        made = []
        for identity, (context, negative) in enumerate(zip(contexts, negatives, strict=True)):
            pictures = self.decode(self.latents(context, negative, identity, range(images), seed))
            for replicate, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / f"{identity}_{replicate}.png")
            made.append(pictures)
        return np.stack(made)
