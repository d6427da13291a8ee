"""A small detector in the form of SCRFD (arXiv:2105.04714): three strides, two anchors a position."""

import torch
from torch import Tensor, nn

STRIDES = (8, 16, 32)
ANCHORS = 2
VALUES = (1, 4, 10)  # of an anchor: score, box distances, landmark offsets


class DetectorNetwork(nn.Module):
    """Backbone, top-down pyramid and a head a stride: 0.51M parameters, 65 MMAC on a 128x128 frame.

    Input `(N, 3, H, W)` RGB, (x - 127.5) / 128, H and W multiples of 32. Output nine maps in insightface's
    order: scores `(N, A, 1)` in [0, 1] of strides 8, 16 and 32, box distances `(N, A, 4)` of the three,
    landmark offsets `(N, A, 10)` of the three, both in strides; A = H / stride * W / stride * 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_unit(3, 16, 2), _unit(16, 32, 2), _Residual(32))
        self.stages = nn.ModuleList(
            nn.Sequential(_unit(channels, wider, 2), *(_Residual(wider) for _ in range(blocks)))
            for channels, wider, blocks in ((32, 40, 2), (40, 64, 2), (64, 80, 1))
        )
        self.laterals = nn.ModuleList(nn.Conv2d(channels, 32, 1) for channels in (40, 64, 80))
        self.smooth = nn.ModuleList(_unit(32, 32) for _ in STRIDES)
        self.heads = nn.ModuleList(_Head(32, 48) for _ in STRIDES)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Return the nine maps: three of scores, three of distances, three of landmark offsets."""
        features = self.stem(frames)
        pyramid = []
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            features = stage(features)
            pyramid.append(lateral(features))
        for level in (1, 0):
            above = nn.functional.interpolate(pyramid[level + 1], scale_factor=2.0, mode="nearest")
            pyramid[level] = pyramid[level] + above
        maps = [
            head(smooth(level)) for head, smooth, level in zip(self.heads, self.smooth, pyramid, strict=True)
        ]
        # In float32: bfloat16 cannot tell a score of .997 from 1.
        scores = [level[0].float().sigmoid() for level in maps]
        return scores + [level[1] for level in maps] + [level[2] for level in maps]


class _Residual(nn.Module):
    """Two 3x3 units around an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _unit(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(features + self.second(self.first(features)))


class _Head(nn.Module):
    """Score logits, box distances and landmark offsets of one stride, each `(N, anchors, values)`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = _unit(channels, hidden)
        self.outputs = nn.ModuleList()
        # Start at a score of 1% (arXiv:1708.02002) and boxes that reach 1.5 strides each way.
        for values, start in zip(VALUES, (-4.6, 1.5, 0.0), strict=True):
            output = nn.Conv2d(hidden, ANCHORS * values, 1)
            nn.init.constant_(output.bias, start)  # type: ignore[arg-type]
            self.outputs.append(output)

    def forward(self, features: Tensor) -> list[Tensor]:
        hidden = self.hidden(features)
        return [
            output(hidden).permute(0, 2, 3, 1).reshape(features.shape[0], -1, values)
            for output, values in zip(self.outputs, VALUES, strict=True)
        ]


def _unit(channels: int, wider: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU(inplace=True)
    )
