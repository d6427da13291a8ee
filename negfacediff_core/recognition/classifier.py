"""What only the training of a recogniser needs: class centres, and a margin loss over cosines to them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negfacediff_core.recognition.backbones import IResNet, PlainNet
from negfacediff_core.recognition.heads import (
    adaface,
    arcface,
    cosface,
    cosines,
    elastic_margins,
    elasticface,
    update_norm_statistics,
)
from negfacediff_core.recognition.seeds import generator_of

# AdaFace's running mean and deviation of norms begin here (arXiv 2204.00964, published code).
_NORM_MEAN, _NORM_DEVIATION = 20.0, 100.0


class Outcome(NamedTuple):
    """Of a batch: the mean `loss`, and of each image `(N,)` the log of the probability of its own identity.

    That probability is the softmax that the loss looks at, margin and all, as in DiffProb's code; `right`
    says whether no other identity is more similar, without any margin.
    """

    loss: Tensor
    log_probability: Tensor
    right: Tensor


class MarginHead(nn.Module):
    """Class centres and one of the margin losses `LOGITS`.

    Partial FC (arXiv 2203.15565), for millions of identities, has its place in the interface: `forward` takes
    a `sampled` subset of the classes and neither reads nor trains the other centres. Sampling itself, and
    centres that are spread over processes, are not implemented: every process holds all of them.
    """

    norm_mean: Tensor
    norm_deviation: Tensor

    def __init__(self, kind: str, width: int, classes: int, scale: float, margin: float, seed: int):
        super().__init__()
        self.kind, self.scale, self.margin = kind, scale, margin
        centres = torch.randn(classes, width, generator=generator_of(seed, "centres", 0))
        self.centres = nn.Parameter(0.01 * centres)
        self.register_buffer("norm_mean", torch.tensor(_NORM_MEAN))
        self.register_buffer("norm_deviation", torch.tensor(_NORM_DEVIATION))

    def forward(
        self, embeddings: Tensor, labels: Tensor, draw: torch.Generator, sampled: Tensor | None = None
    ) -> Outcome:
        """Loss of `(N, width)` embeddings, not normalised, with `labels` `(N,)`.

        `draw`, on the CPU, is what random margins come from; in evaluation these are their mean, and nothing
        is learnt from norms. `sampled` `(S,)` are ascending classes, those of the labels among them; the
        softmax is then over these alone.
        """
        centres: Tensor = self.centres
        if sampled is not None:
            centres, labels = centres[sampled], torch.searchsorted(sampled, labels)
        cosine = cosines(embeddings, centres)
        logarithms = F.log_softmax(LOGITS[self.kind](self, cosine, labels, embeddings, draw), dim=1)
        loss = F.nll_loss(logarithms, labels)
        with torch.no_grad():
            own, similar = (values.gather(1, labels[:, None])[:, 0] for values in (logarithms, cosine))
            return Outcome(loss, own, similar >= cosine.amax(dim=1))


def _cosface(
    head: MarginHead, cosine: Tensor, labels: Tensor, embeddings: Tensor, draw: torch.Generator
) -> Tensor:
    return cosface(cosine, labels, head.scale, head.margin)


def _arcface(
    head: MarginHead, cosine: Tensor, labels: Tensor, embeddings: Tensor, draw: torch.Generator
) -> Tensor:
    return arcface(cosine, labels, head.scale, head.margin)


def _elasticface(
    head: MarginHead, cosine: Tensor, labels: Tensor, embeddings: Tensor, draw: torch.Generator
) -> Tensor:
    if not head.training:
        return cosface(cosine, labels, head.scale, head.margin)
    margins = elastic_margins(len(labels), draw, head.margin).to(cosine.device)
    return elasticface(cosine, labels, margins, head.scale)


def _adaface(
    head: MarginHead, cosine: Tensor, labels: Tensor, embeddings: Tensor, draw: torch.Generator
) -> Tensor:
    norms = embeddings.detach().float().norm(dim=1, keepdim=True)
    statistics = head.norm_mean, head.norm_deviation
    if head.training:
        statistics = update_norm_statistics(norms, *statistics)
        # in place, and none of the tensors that the loss is computed from: processes broadcast their buffers
        for buffer, value in zip((head.norm_mean, head.norm_deviation), statistics, strict=True):
            buffer.copy_(value)
    return adaface(cosine, labels, norms, *statistics, scale=head.scale, margin=head.margin)


#: By name: logits `(N, C)` of cosines, labels `(N,)`, embeddings and a generator.
LOGITS: dict[str, Callable[[MarginHead, Tensor, Tensor, Tensor, torch.Generator], Tensor]] = {
    "cosface": _cosface,
    "arcface": _arcface,
    "elasticface": _elasticface,
    "adaface": _adaface,
}


class Recogniser(nn.Module):
    """Backbone and head as one module, which processes keep equal."""

    def __init__(self, backbone: IResNet | PlainNet, head: MarginHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Tensor, labels: Tensor, draw: torch.Generator) -> Outcome:
        """Outcome of `(N, 3, 112, 112)` uint8 crops with `labels` `(N,)`."""
        outcome: Outcome = self.head(self.backbone(scaled(crops)), labels, draw)
        return outcome


def scaled(crops: Tensor) -> Tensor:
    """Turn uint8 crops `(N, 3, S, S)` into float32 in [-1, 1], in the layout of fast convolutions."""
    return crops.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)
