"""What the trainings of first stage and generator share: rates, seeds, averaged weights, checkpoints."""

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError
from negfacediff_core.images import to_float
from negfacediff_core.tensor_files import read_tensors

Progress = Callable[[int, int, float], None]  # step, steps, smoothed loss
State = dict[str, Any]  # tensors, numbers, text, and containers of these

CHECKPOINT_NAME = "checkpoint.pt"
CURVE_NAME = "curve.csv"


def cosine_rate(step: int, steps: int, warmup: int, floor: float = 0.01) -> float:
    """Share of the peak learning rate at `step`: linear rise over `warmup`, then half a cosine to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


@contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Make torch's draws inside a function of (seed, step) alone, and leave the global generator as it was.

    So no generator state has to be saved for a training to resume exactly.
    """
    mixed = int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mixed)
        yield


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: elsewhere autocast only costs time."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def to_planes(images: NDArray[np.uint8]) -> Tensor:
    """`to_float`, laid out channel by channel: the layout in which a CPU normalises groups fast.

    What is laid out pixel by pixel stays so through every convolution, and the gradient of GroupNorm is then
    20 times slower.
    """
    return to_float(images).contiguous()


def average_weights(average: nn.Module, live: nn.Module, step: int, decay: float) -> None:
    """Move `average` towards `live`: a <- d a + (1 - d) w, with d rising from .1 to `decay`.

    d = min(decay, (1 + step) / (10 + step)), so that the random start is forgotten at once.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(live.parameters()), weight)


def smoothed(average: float, value: float, step: int) -> float:
    """Running mean of the loss over about 50 steps. Raises NegFaceDiffError once the loss is not finite."""
    if not math.isfinite(value):
        raise NegFaceDiffError(
            f"The training diverged at step {step}: its loss is {value}. Start again at a lower rate."
        )
    return value if step == 0 else average + (value - average) * max(0.02, 1 / (step + 1))


def load_state(path: Path) -> State:
    """Read a checkpoint. Raises WeightsError if it is missing or damaged, or could run code."""
    try:
        return read_tensors(path)
    except FileNotFoundError as error:
        raise WeightsError(f"There is no checkpoint at {path}: run this training first.") from error
    except Exception as error:  # torch raises a dozen unrelated types for a damaged file
        raise WeightsError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}): delete it to train afresh."
        ) from error


def check_origin(state: State, origin: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError unless the checkpoint `state` was started with the settings in `origin`."""
    different = [key for key, value in origin.items() if state["origin"].get(key) != value]
    if different:
        raise ConfigError(
            f"The checkpoint {path} is of another training: its {' and '.join(different)} differ. Continue "
            "with what it was started with, or choose another folder."
        )


def write_curve(rows: list[dict[str, float]], path: Path) -> None:
    """Write the training curve as CSV, one row a record; not every record has every column."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def optimiser_for(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all of `module`, where norms and biases are not decayed."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), foreach=True)


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float) -> None:
    """One step of `optimiser` at learning rate `rate`, its gradients clipped to norm `clip`."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
    optimiser.step()
