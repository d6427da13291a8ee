"""The loop that trains a recogniser: a killed run goes on from its folder as if nothing had happened.

On one device with as many threads and processes, a run that was interrupted and continued equals an
uninterrupted one, on a CPU bit for bit: the order of images, their variation, dropout and random margins are
functions of (seed, epoch, step), and everything else stands in the state.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from negfacediff_core.errors import NegFaceDiffError, StoppedError, WeightsError
from negfacediff_core.recognition.classifier import MarginHead, Recogniser, scaled
from negfacediff_core.recognition.course import Position, is_over, judged
from negfacediff_core.recognition.curves import write_picture, write_table
from negfacediff_core.recognition.dynamics import (
    HELD_OUT,
    IMAGES,
    has_final,
    write_epoch,
    write_final,
    write_images,
)
from negfacediff_core.recognition.held_out import held_out_scores
from negfacediff_core.recognition.launcher import Progress, run_processes
from negfacediff_core.recognition.loader import Batch, Loader, epoch_order
from negfacediff_core.recognition.randaugment import Variation
from negfacediff_core.recognition.record import Record, look_back
from negfacediff_core.recognition.seeds import seed_of
from negfacediff_core.recognition.training_job import BEST, STATE, TrainingJob, claim, starting_network
from negfacediff_core.stopping import unwanted
from negfacediff_core.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Steps between two looks at the clock and at the loss, where a look costs something: all processes, or a GPU,
# must have come as far.
_LOOK = 20
# Seconds of an epoch that a new picture of the curves is worth; the last epoch gets one in any case.
_DRAWN = 10.0


def fit(job: TrainingJob, progress: Progress) -> dict[str, Any]:
    """Train as `job` says, or go on where the folder's last checkpoint stands; nothing where it is complete.

    The folder then holds `best.pt` (the network of the best epoch by its EER on held-out identities),
    `curves.csv`, `curves.svg`, `dynamics` and the state. `progress` is told of images seen, and to see.
    Returns the figures of the best epoch, and how many `epochs` were trained. Whoever calls it `owned` the
    folder.

    Raises:
        ConfigError: if the folder holds another training.
        NegFaceDiffError: if the loss is no number any more.
        StoppedError: if nobody wants the training any more (see `stopping`); its state is saved.
    """
    claim(job)
    write_images(job.folder, IMAGES, job.training)
    write_images(job.folder, HELD_OUT, job.held_out)
    state = read_state(job)
    if state is None or not is_over(job.recipe, Position(**state["position"])) or not has_final(job.folder):
        run_processes(_train, job, progress)
        state = read_state(job)
    assert state is not None  # a training that has ended has saved it
    position = Position(**state["position"])
    return {**position.best, "epochs": position.epoch}


def read_state(job: TrainingJob) -> dict[str, Any] | None:
    """Read the state of a training's folder; None if there is none, WeightsError if it is damaged."""
    path = job.folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = read_tensors(path, "cpu")
    except Exception as error:  # whatever torch's reader stumbles over
        raise WeightsError(
            f"{path} cannot be read ({type(error).__name__}): delete it to train afresh."
        ) from error
    return state


class _Run:
    """The networks of a training in one process, its position, and what an epoch has recorded so far."""

    def __init__(self, fabric: "Fabric", job: TrainingJob) -> None:
        self.fabric, self.job, self.position = fabric, job, Position()
        recipe, classes = job.recipe, job.training.classes
        if job.execution.threads:
            torch.set_num_threads(job.execution.threads)
        head = MarginHead(recipe.head, recipe.width, classes, recipe.scale, recipe.head_margin, recipe.seed)
        self.module = Recogniser(starting_network(job), head)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = torch.optim.SGD(
            [one for one in self.module.parameters() if one.requires_grad],
            lr=recipe.peak_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        # these wrap the same weights: what is read, saved and restored are the ones within
        self.wrapped, self.stepper = fabric.setup(self.module, self.optimiser)
        variation = Variation(
            recipe.flip, recipe.operations, recipe.magnitude, recipe.erase, recipe.seed, recipe.policy
        )
        self.loader = Loader(job.training, variation, job.loaders, fabric.device)
        self.forget()

    def forget(self) -> None:
        """Begin the record of an epoch."""
        self.loss = torch.zeros((), device=self.fabric.device)
        self.record = Record(len(self.job.training), self.fabric.device)

    def gather(self) -> None:
        """Put together what the processes have recorded."""
        if self.fabric.world_size > 1:
            self.fabric.all_reduce(self.loss, reduce_op="mean")
        self.record.gather(self.fabric.world_size)
        self.position.loss = float(self.loss)

    def save(self) -> None:
        """Write the state, in one piece; all processes take part, and the first one writes."""
        self.gather()
        if self.fabric.global_rank:
            return
        state = {
            "position": asdict(self.position),
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.fabric.strategy.precision.state_dict(),
            "log_probability": self.record.log_probability,
            "outcome": self.record.outcome,
        }
        write_tensors(self.job.folder / STATE, state)

    def stopped(self) -> StoppedError:
        """Save a training that nobody wants any more; returns what all of its processes raise."""
        self.save()
        return StoppedError(f"The training was stopped; {self.job.folder} has all of it, to go on with.")

    def restore(self) -> None:
        """Go back to the folder's state, where there is one."""
        state = read_state(self.job)
        if state is None:
            return
        self.position = Position(**state["position"])
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        self.loss = torch.tensor(self.position.loss, device=self.fabric.device)
        self.record.log_probability = state["log_probability"].to(self.fabric.device)
        self.record.outcome = state["outcome"].to(self.fabric.device)

    def embed(self, crops: Tensor) -> Tensor:
        """Embed crops for the choice of an epoch."""
        with self.fabric.autocast():
            return self.module.backbone(scaled(crops.to(self.fabric.device)))


def _train(fabric: "Fabric", job: TrainingJob, progress: Progress) -> None:
    """All of a training, in one of its processes."""
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    # dropout draws from the global generators
    with torch.random.fork_rng(devices=devices), _quick_convolutions():
        run = _Run(fabric, job)
        run.restore()
        while not is_over(job.recipe, run.position):
            _train_epoch(run, progress)
            _end_epoch(run)
        # the last state stands: whoever is stopped here looks again
        seen = look_back(fabric, run.module, job.training, job.loaders)
        if fabric.global_rank == 0:
            write_final(job.folder, *seen.arrays())
        progress(job.images, job.images)


@contextmanager
def _quick_convolutions() -> Iterator[None]:
    """Let cuDNN look for the quickest way to do the same convolutions over and over."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _train_epoch(run: _Run, progress: Progress) -> None:
    """The steps of an epoch that are not done yet."""
    job, position = run.job, run.position
    order = epoch_order(len(job.training), job.batch, job.recipe.seed, position.epoch)
    parts = [part for batch in order[position.step :] for part in _parts(run, batch)]
    batches = run.loader.batches(position.epoch, parts)
    run.module.train()
    saved = looked = time.monotonic()
    run.loader.waited = 0.0
    many = run.fabric.world_size > 1
    for step in range(position.step, len(order)):
        progress((position.epoch * job.steps + step) * job.batch, job.images)
        _step(run, batches)
        position.step = step + 1
        if (
            (many or run.fabric.device.type == "cuda")
            and position.step % _LOOK
            and position.step < len(order)
        ):
            continue
        _check(run)
        now = time.monotonic()
        position.seconds, looked = position.seconds + now - looked, now
        position.waited, run.loader.waited = position.waited + run.loader.waited, 0.0
        stop, due = run.fabric.broadcast((unwanted(), now - saved >= job.execution.checkpoint_seconds))
        if stop:
            raise run.stopped()
        if due and position.step < len(order):
            run.save()
            saved = looked = time.monotonic()


def _parts(run: _Run, batch: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """This process's share of a batch, in the parts that go through the network one by one."""
    shares = batch.reshape(run.job.recipe.accumulate, run.fabric.world_size, -1)
    yield from shares[:, run.fabric.global_rank]


def _step(run: _Run, batches: Iterator[Batch]) -> None:
    """One step of the optimiser."""
    recipe, position, parts = run.job.recipe, run.position, run.job.recipe.accumulate
    for group in run.optimiser.param_groups:
        group["lr"] = run.job.rate(position)
    for part in range(parts):
        batch = next(batches)
        seed = seed_of(
            recipe.seed,
            "step",
            position.epoch,
            position.step,
            part * run.fabric.world_size + run.fabric.global_rank,
        )
        torch.manual_seed(seed)
        with run.fabric.no_backward_sync(run.wrapped, enabled=part < parts - 1):
            outcome = run.wrapped(batch.crops, batch.labels, torch.Generator().manual_seed(seed))
            run.fabric.backward(outcome.loss / parts)
        run.loss += outcome.loss.detach() / parts
        run.record.note(batch.images, outcome)
    if recipe.clip:
        _clip(run)
    run.stepper.step()
    run.optimiser.zero_grad(set_to_none=True)


def _clip(run: _Run) -> None:
    """Shorten the gradients of the network, and of the class centres, to the norm that is allowed."""
    run.fabric.strategy.precision.unscale_gradients(run.optimiser)
    for part in (run.module.backbone, run.module.head):
        torch.nn.utils.clip_grad_norm_(part.parameters(), run.job.recipe.clip)


def _check(run: _Run) -> None:
    if not torch.isfinite(run.loss):
        raise _diverged(run)


def _diverged(run: _Run) -> NegFaceDiffError:
    recipe = run.job.recipe
    return NegFaceDiffError(
        f"The training diverged in epoch {run.position.epoch + 1}: its numbers are not finite. Lower "
        f"learning_rate ({recipe.learning_rate:g}) or scale ({recipe.scale:g}), or set warmup, and begin in "
        "another folder."
    )


def _end_epoch(run: _Run) -> None:
    """Judge an epoch by the held-out identities, write what it leaves, and save the state behind it."""
    run.gather()
    position: Position | None = run.fabric.broadcast(None if run.fabric.global_rank else _judge(run))
    if position is None:
        raise run.stopped()
    run.position = replace(position, epoch=position.epoch + 1, step=0, loss=0.0, seconds=0.0, waited=0.0)
    if run.fabric.global_rank == 0 and (position.seconds > _DRAWN or is_over(run.job.recipe, run.position)):
        write_picture(run.job.folder, position.rows)
    run.forget()
    run.save()


def _judge(run: _Run) -> Position | None:
    """Take note of how good the network is after an epoch; None if nobody wants to know any more."""
    folder = run.job.folder
    run.module.eval()
    try:
        scores = held_out_scores(run.job.held_out, run.embed, run.job.loaders)
    except StoppedError:
        return None
    except FloatingPointError as error:
        raise _diverged(run) from error
    row = _row(run, scores)
    position = judged(run.position, scores, run.job.recipe.patience)
    position.rows.append(row)
    write_epoch(folder, position.epoch + 1, *run.record.arrays())
    if position.best["epoch"] == position.epoch + 1:
        write_tensors(folder / BEST, _network(run, position.best))
    write_table(folder, position.rows)
    return position


def _row(run: _Run, scores: dict[str, float]) -> dict[str, float]:
    """The row of the curves for the epoch that ends."""
    position, job = run.position, run.job
    return {
        "epoch": position.epoch + 1,
        "loss": position.loss / job.steps,
        "accuracy": run.record.accuracy(),
        "learning_rate": job.rate(replace(position, step=job.steps - 1)),
        **scores,
        "seconds": position.seconds,
        "images_per_second": job.steps * job.batch / max(position.seconds, 1e-9),
        "waited": position.waited / max(position.seconds, 1e-9),
    }


def _network(run: _Run, scores: dict[str, float]) -> dict[str, Any]:
    """What the file of the best epoch holds: a network that can be built, and where it comes from."""
    return {
        "architecture": run.job.architecture,
        "backbone": run.module.backbone.state_dict(),
        "recipe": run.job.recipe.model_dump(mode="json"),
        "scores": scores,
    }
