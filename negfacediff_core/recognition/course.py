"""The course of a training: where it is, its learning rate, which epoch is the best, and when it ends."""

import math
from dataclasses import dataclass, field, replace

from negfacediff_core.recognition.recipe import RecogniserConfig

# Plateau: how often the rate falls before there is no more to gain.
_FALLS = 3


@dataclass
class Position:
    """Where a training is, besides its weights.

    `epoch` epochs and `step` steps of the next are done. Of that epoch, `loss` sums the steps so far,
    `seconds` and `waited` are the time they took and the part of it without a batch. `falls`, `idle` and
    `best` are the state of the schedule plateau and of the choice of an epoch; `rows` are the curves.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    falls: int = 0
    idle: int = 0
    best: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)


def rate_at(recipe: RecogniserConfig, position: Position, steps: int) -> float:
    """Learning rate of the next step, of an epoch with so many `steps`."""
    done = position.epoch + position.step / steps
    warm = min(1.0, (done * steps + 1) / (recipe.warmup * steps)) if recipe.warmup else 1.0
    fallen = {
        "steps": 0.1 ** sum(drop <= position.epoch + 1 for drop in recipe.drops),
        "plateau": 0.1**position.falls,
        "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, done / recipe.epochs))),
    }
    return recipe.peak_rate * warm * fallen[recipe.schedule]


def judged(position: Position, scores: dict[str, float], patience: int) -> Position:
    """Take note of an epoch's held-out `scores`: is it the best, and have too many brought no gain?"""
    now = {"epoch": float(position.epoch + 1), **scores}
    best = position.best
    if not best or (scores["eer"], -scores["fdr"]) < (best["eer"], -best["fdr"]):
        return replace(position, best=now, idle=0)
    if position.idle + 1 < patience:
        return replace(position, idle=position.idle + 1)
    return replace(position, idle=0, falls=position.falls + 1)


def is_over(recipe: RecogniserConfig, position: Position) -> bool:
    """Tell whether nothing is left to train."""
    if position.epoch >= recipe.epochs:
        return True
    if recipe.schedule != "plateau":
        return False
    if not recipe.stop:
        return position.falls > _FALLS
    return position.epoch - position.best.get("epoch", position.epoch) >= recipe.stop
