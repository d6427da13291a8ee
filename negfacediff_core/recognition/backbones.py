"""Recogniser networks: aligned `(N, 3, 112, 112)` RGB crops in [-1, 1] to `(N, width)` embeddings."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from negfacediff_core.errors import ConfigError

INPUT_SIZE = 112


def _convolution(channels: int, out_channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, size, stride, padding=size // 2, bias=False)


def _side_after(side: int, strides: Sequence[int]) -> int:
    """Side of the grid after 3x3 convolutions with padding 1 and these strides."""
    for stride in strides:
        side = (side - 1) // stride + 1
    return side


def _centred_norm(width: int) -> nn.BatchNorm1d:
    """Batch norm of the embedding with frozen gain and shift.

    The heads normalise the length away, so a gain is redundant; a shift would give all identities a common
    direction.
    """
    norm = nn.BatchNorm1d(width)
    norm.requires_grad_(False)
    return norm


def _embedding(x: Tensor, fc: nn.Linear, features: nn.BatchNorm1d) -> Tensor:
    """The last layers, in float32 even under autocast, as in insightface: cosines come of what they give."""
    kind = x.device.type
    # tensors of the device meta, of which costs are counted, know no autocast
    without = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with without:
        embeddings: Tensor = features(fc(x.float()))
    return embeddings


# The published networks learn a slope a channel. A fixed slope of the same start value trains a small
# network about a quarter faster on a CPU, where the gradient of the slopes costs more than the convolutions
# around it.
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "prelu": nn.PReLU,
    "leaky": lambda channels: nn.LeakyReLU(0.25),
}


class IResBlock(nn.Module):
    """BN - 3x3 - BN - PReLU - strided 3x3 - BN, plus a shortcut; nothing after the sum."""

    def __init__(self, channels: int, out_channels: int, stride: int, activation: str = "prelu"):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _convolution(channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = ACTIVATIONS[activation](out_channels)
        self.conv2 = _convolution(out_channels, out_channels, stride=stride)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            nn.Sequential(_convolution(channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
            if stride > 1 or channels != out_channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to `(N, out_channels, H / stride, W / stride)`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(x)) + shortcut


class IResNet(nn.Module):
    """Improved residual network of ArcFace (arXiv 1801.07698, section 3.1), keys as in insightface.

    `layers` blocks in each stage of `channels`, every stage halving the grid; `width` numbers an embedding.
    The small forms first average `input_pool` x `input_pool` pixels, for images that carry no finer detail,
    and stride in the stem. `dropout` acts before the last linear layer; `activation` is a row of
    `ACTIVATIONS`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int] = (64, 128, 256, 512),
        width: int = 512,
        stem_stride: int = 1,
        input_pool: int = 1,
        dropout: float = 0.0,
        activation: str = "prelu",
    ):
        super().__init__()
        if len(layers) != len(channels) or not 1 <= len(layers) <= 4 or min(layers) < 1:
            raise ConfigError(
                f"An IResNet needs 1 to 4 stages of at least one block, and as many `channels` as `layers`; "
                f"got layers {list(layers)} and channels {list(channels)}."
            )
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"Unknown activation {activation!r}; the activations are {', '.join(ACTIVATIONS)}."
            )
        self.input_pool = input_pool
        self.conv1 = _convolution(3, channels[0], stride=stem_stride)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.prelu = ACTIVATIONS[activation](channels[0])
        incoming = [channels[0], *channels[:-1]]
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        for name, blocks, before, after in zip(self.stages, layers, incoming, channels, strict=True):
            repeated = [IResBlock(after, after, 1, activation) for _ in range(blocks - 1)]
            self.add_module(name, nn.Sequential(IResBlock(before, after, 2, activation), *repeated))
        side = _side_after(INPUT_SIZE // input_pool, [stem_stride] + [2] * len(layers))
        self.bn2 = nn.BatchNorm2d(channels[-1])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels[-1] * side * side, width)
        self.features = _centred_norm(width)

    def forward(self, crops: Tensor) -> Tensor:
        """Embed `(N, 3, 112, 112)` crops in [-1, 1]: `(N, width)`, not normalised."""
        return self.embed_pooled(nn.functional.avg_pool2d(crops, self.input_pool))

    def embed_pooled(self, pooled: Tensor) -> Tensor:
        """Embed crops that are averaged already, `(N, 3, 112 // input_pool, 112 // input_pool)`."""
        x = self.prelu(self.bn1(self.conv1(pooled)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return _embedding(self.dropout(torch.flatten(self.bn2(x), 1)), self.fc, self.features)


class PlainNet(nn.Module):
    """All-convolutional network without shortcuts (after arXiv 1412.6806): a family apart from `IResNet`.

    Each stage of `channels` is a strided 3x3 convolution and `layers` - 1 further ones, each with BN and
    ReLU; a 1x1 convolution to `neck` channels and a linear layer make the `width` numbers of an embedding.
    """

    def __init__(
        self,
        layers: Sequence[int],
        channels: Sequence[int],
        neck: int,
        width: int = 512,
        input_pool: int = 1,
    ):
        super().__init__()
        if len(layers) != len(channels) or not layers or min(layers) < 1:
            raise ConfigError(
                f"A PlainNet needs stages of at least one convolution, and as many `channels` as `layers`; "
                f"got layers {list(layers)} and channels {list(channels)}."
            )
        self.input_pool = input_pool
        self.trunk = nn.Sequential()
        before = 3
        for blocks, after in zip(layers, channels, strict=True):
            for index in range(blocks):
                self._append(_convolution(before, after, stride=2 if index == 0 else 1), after)
                before = after
        self._append(_convolution(before, neck, 1), neck)
        side = _side_after(INPUT_SIZE // input_pool, [2] * len(layers))
        self.fc = nn.Linear(neck * side * side, width)
        self.features = _centred_norm(width)

    def _append(self, convolution: nn.Conv2d, channels: int) -> None:
        self.trunk.extend([convolution, nn.BatchNorm2d(channels), nn.ReLU()])

    def forward(self, crops: Tensor) -> Tensor:
        """Embed `(N, 3, 112, 112)` crops in [-1, 1]: `(N, width)`, not normalised."""
        return self.embed_pooled(nn.functional.avg_pool2d(crops, self.input_pool))

    def embed_pooled(self, pooled: Tensor) -> Tensor:
        """Embed crops that are averaged already, `(N, 3, 112 // input_pool, 112 // input_pool)`."""
        return _embedding(torch.flatten(self.trunk(pooled), 1), self.fc, self.features)


# Blocks in each stage of the published iResNets.
IRESNET_LAYERS: dict[int, tuple[int, ...]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
}
BACKBONES: dict[str, Callable[..., IResNet | PlainNet]] = {"iresnet": IResNet, "plain": PlainNet}


def build_backbone(architecture: dict[str, Any], seed: int = 0) -> IResNet | PlainNet:
    """Build a network from `{"family": row of BACKBONES, **its arguments}`, weights drawn from `seed` alone.

    Raises ConfigError for an unknown family or argument.
    """
    arguments = dict(architecture)
    family = arguments.pop("family", None)
    if family not in BACKBONES:
        raise ConfigError(f"Unknown recogniser family {family!r}; the families are {', '.join(BACKBONES)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return BACKBONES[family](**arguments)
        except TypeError as error:
            raise ConfigError(f"Recogniser architecture {architecture} cannot be built: {error}.") from error
