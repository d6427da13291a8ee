"""The leakage gate of a run: its stages `gallery`, `neighbours` and `leakage`, planned and checked."""

import re
import shlex
from pathlib import PurePath
from typing import NamedTuple

from negfacediff_core.config import BuildConfig, LeakageConfig, Policy
from negfacediff_core.errors import ConfigError, StoreError, WeightsError
from negfacediff_core.evaluation.leakage import RATES, impostor_pairs, needed_pairs, sampled, too_few_pairs
from negfacediff_core.stages import gallery, kept, leakage, neighbours
from negfacediff_core.stages.aligned import SIZE
from negfacediff_core.stages.models import conditioner_hash, embedder_of, named, network_weight
from negfacediff_core.store.layout import StageSpec, Weight, adopt, fingerprint
from negfacediff_core.store.location import locate
from negfacediff_core.store.records import pending
from negfacediff_core.store.runs import stages_of_run

# The recognisers of a gate, in the order in which they are given.
ROLES = ("first", "second")
# Most letters of a gallery's name, and digits of a hash, in the names of what a gate makes.
_LETTERS, _DIGITS = 16, 6


class Gate(NamedTuple):
    """A planned gate.

    `run` holds the stages of the run by name, with their extents, and `stages` those of the gate, in order.
    `conditioner_known` is whether it could be checked that no recogniser conditioned the generator.
    """

    run: dict[str, StageSpec]
    stages: dict[str, StageSpec]
    conditioner_known: bool

    @property
    def label(self) -> str:
        """Tells gates of a run apart in the names of what they make.

        It is the gallery's name and a hash of all that it holds, of the recognisers, and of the detector if
        the gallery is of images.
        """
        people = self.stages["gallery"]
        name = re.sub("[^a-z0-9]+", "-", PurePath(people.weights["gallery"].path).stem.lower()).strip("-")
        looks = {**people.weights, **self.stages["neighbours"].weights}
        hashes = {role: dict(weight.sha256) for role, weight in looks.items()}
        return f"{_shortened(name)}-{fingerprint({**people.config, **hashes})[:_DIGITS]}".lstrip("-")


def _shortened(name: str) -> str:
    """The first words of a name, so many as _LETTERS hold; of a word that is longer, its beginning."""
    if len(name) <= _LETTERS:
        return name
    return name[: _LETTERS + 1].rpartition("-")[0] or name[:_LETTERS]


def plan_gate(store: str, run: str, settings: LeakageConfig) -> Gate:
    """Describe the stages of a run's gate, after checking all that they need; nothing is written.

    Raises:
        StoreError: if there is no such run, or its images are not aligned yet.
        ConfigError: for a recogniser that conditioned the generator, and rates that are not calibrated.
        WeightsError, ContextsError: for recognisers, detector and gallery.
    """
    store = locate(store).url
    stages = stages_of_run(store, run)
    lacking = sum(len(pending(stages[name])) for name in ("aligned", "embeddings"))
    if lacking:
        raise StoreError(
            f"{lacking} units of aligned images or embeddings of the run {run} are missing: finish it first, "
            f"with {shlex.join(['negfacediff', 'resume', store, run])}"
        )
    if settings.fmr not in RATES:
        raise ConfigError(f"fmr is {settings.fmr:g}, but thresholds are made at {', '.join(map(str, RATES))}")
    recognisers = _recognisers(stages, settings)
    known = _check_conditioner(stages, recognisers)
    aligned = stages["aligned"]
    options = dict(aligned.config)
    if settings.detector_size:
        options["detector_size"] = settings.detector_size
    detector = aligned.weights["detector"]
    if settings.detector is not None:
        with named("detector"):
            detector = network_weight(settings.detector, "detection")
    if settings.pictures and not gallery.is_images(settings.gallery):
        raise ConfigError(
            f"the gallery {settings.gallery} holds embeddings, which show nothing: leave --pictures out, or "
            "give the folder of images"
        )
    people = adopt(gallery.plan(store, settings.gallery, recognisers, detector, options))
    if settings.policy != Policy.report:
        _check_pairs(people, settings.fmr)
    found = adopt(neighbours.plan(aligned, people, recognisers))
    counted = adopt(leakage.plan(stages["embeddings"], found, people, recognisers))
    return Gate(stages, {spec.name: spec for spec in (people, found, counted)}, known)


def plan_kept(gate: Gate, build: BuildConfig, rate: float) -> dict[str, StageSpec]:
    """Describe the stages that are made anew, embeddings first, for the run without what leaks at a rate.

    `build` is that of the gate's run.
    """
    marked = kept.plan(gate.run["embeddings"], gate.stages["leakage"], rate)
    return kept.remake(build, gate.run, marked)


def _recognisers(stages: dict[str, StageSpec], settings: LeakageConfig) -> dict[str, Weight]:
    """Find the recognisers by role; the judge of the run where none is named."""
    weights = [stages["embeddings"].weights["judge"]]
    if settings.recognisers:
        with named("recogniser"):
            weights = [network_weight(path, "recognition") for path in settings.recognisers]
    recognisers = dict(zip(ROLES, weights, strict=False))
    for weight in weights:
        if (size := embedder_of(weight, threads=1).input_size) != SIZE:
            raise WeightsError(
                f"the recogniser {weight.path} takes crops of {size} pixels; give one of {SIZE}x{SIZE} crops."
            )
    if len({weight.sha256["file"] for weight in weights}) < len(weights):
        raise ConfigError(f"both recognisers are {weights[0].path}: name two different ones, or one.")
    return recognisers


def _check_pairs(people: StageSpec, rate: float) -> None:
    """Refuse a rate for which the gallery cannot have enough impostor pairs, before any work."""
    listed = gallery.people_listed(people)
    pairs = impostor_pairs(listed, listed[sampled(len(listed))])
    if pairs < needed_pairs(rate):
        raise ConfigError(too_few_pairs(pairs, rate))


def _check_conditioner(stages: dict[str, StageSpec], recognisers: dict[str, Weight]) -> bool:
    """Refuse recognisers that the generator or its contexts know; returns whether that could be told."""
    try:
        trained_with = conditioner_hash(stages["samples"].weights["generator"].path)
    except WeightsError:  # the generator is no longer where it was
        trained_with = None
    conditioners = {trained_with}
    if "contexts" in stages and "recogniser" in stages["contexts"].weights:
        conditioners.add(stages["contexts"].weights["recogniser"].sha256["file"])
    for weight in recognisers.values():
        if weight.sha256["file"] in conditioners:
            raise ConfigError(
                f"the recogniser {weight.path} conditioned the generator, which learned to please it: what "
                "looks new to it need not be; give another one."
            )
    return conditioners != {None}
