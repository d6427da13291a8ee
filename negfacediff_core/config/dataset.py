"""What is built: `BuildConfig`, stage by stage. It decides every pixel, and is fingerprinted."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from negfacediff_core.config.choices import (
    CONTEXT_FIELDS,
    ContextSource,
    Form,
    MedianRule,
    NegativeWeights,
    Precision,
    Protocol,
    RandomRule,
    Rule,
    Sampler,
    Spacing,
    Template,
    Transform,
    Weight,
)
from negfacediff_core.config.model import Model, Optional, Seed


class ContextsConfig(Model):
    """Identity contexts: one unit vector an identity."""

    source: ContextSource = Field(
        default=ContextSource.uniform,
        description="uniform: on the sphere (the paper's). fitted: a normal distribution fitted to `file`. "
        "file: the vectors in `file`, as they are. folder: embeddings of the faces in `folder`. two_stage: "
        "embeddings of faces that `generator` makes unasked. mixup: between two vectors of `file` each. "
        "packed: spread evenly over the sphere.",
    )
    file: Optional = Field(
        default=None,
        description="Embeddings for the sources fitted, file and mixup: .npz, Parquet or Zarr with "
        "`contexts`, or a published .npy.",
    )
    folder: Optional = Field(
        default=None,
        description="Images for the source folder: one an identity, or a sub-folder of them an identity.",
    )
    generator: str = Field(
        default="packs/demo/generator",
        description="For the source two_stage: an unconditional release, or one that learned an empty "
        "context.",
    )
    steps: int = Field(default=50, ge=1, le=1000, description="DDIM steps of the source two_stage.")
    recogniser: str = Field(
        default="packs/demo/faces",
        description="insightface model pack whose detector and recogniser embed the images of the sources "
        "folder and two_stage: the recogniser that samples.generator was trained with.",
    )
    detector_size: int = Field(
        default=128, ge=32, le=1280, multiple_of=32, description="Side of that detector's input, in pixels."
    )
    margin: float = Field(
        default=0.25,
        ge=0,
        le=0.5,
        description="The source mixup takes shares in [margin, 1 - margin] of one vector and of another.",
    )
    packing_steps: int = Field(
        default=200,
        ge=1,
        le=10_000,
        description="Steps of gradient descent of the source packed; one takes about 4 s at 10,050 x 512.",
    )
    max_cosine: float = Field(
        default=1.0,
        gt=-1,
        le=1,
        description="Cosine that no two contexts may reach: an identity is drawn anew until it is far enough "
        "from all before it. 1: no bound.",
    )
    count: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Identities that are packed, or kept apart by max_cosine, together; a dataset cannot "
        "grow beyond them. 0: those of the first build of this name.",
    )
    seed: Seed = 0

    @property
    def joint(self) -> bool:
        """Whether contexts depend on each other, so that all are made together."""
        return self.source == ContextSource.packed or self.max_cosine < 1

    @model_validator(mode="after")
    def _fields_go_with_the_source(self) -> "ContextsConfig":
        read = (*CONTEXT_FIELDS[self.source], "source", "seed", "max_cosine", *["count"] * self.joint)
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in read and value is None:
                what = "the embeddings to read" if name == "file" else "the images to embed"
                raise ValueError(f"the context source {self.source} needs `{name}`: {what}")
            if name not in read and value != field.default:
                fitting = [source for source, fields in CONTEXT_FIELDS.items() if name in fields]
                bound = ", or with max_cosine below 1" if name == "count" else ""
                default = "null" if field.default is None else field.default
                raise ValueError(
                    f"the context source {self.source} does not read contexts.{name}, which is {value!r}: "
                    f"leave it at {default}, or take it with the source {' or '.join(fitting)}{bound}"
                )
        return self


class NegativesConfig(Model):
    """Which other identity each identity is pushed away from."""

    rule: Rule = Field(
        default=Rule.far,
        description="How the negative is picked. far: the identity least like it. mid: the median one. "
        "close: the most like it. rand: any other. null: the zero vector. none: no negative, and w is 0.",
    )
    count: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Negatives of each identity: the nearest of the rule close, the farthest of far, those "
        "about the median of mid, different ones of rand. none and null have no others.",
    )
    weights: NegativeWeights = Field(
        default=NegativeWeights.equal,
        description="How several negatives share the weight w: equal, or by rank as 1, 1/2, 1/3, ...",
    )
    pool: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="Identities that negatives are picked from. 0: those of the first build of this name; "
        "it stays fixed when the dataset grows, so that no negative ever moves.",
    )
    rand: RandomRule = Field(default=RandomRule.seeded, description="What the rule rand draws.")
    mid: MedianRule = Field(default=MedianRule.corrected, description="Which median the rule mid takes.")
    seed: Seed = 0

    @field_validator("rule", mode="before")
    @classmethod
    def _null_is_a_rule(cls, value: Any) -> Any:
        return Rule.null if value is None else value  # what YAML reads the word null as

    @model_validator(mode="after")
    def _several_of_somebody(self) -> "NegativesConfig":
        if self.count > 1 and self.rule in (Rule.none, Rule.null):
            raise ValueError(f"the rule {self.rule} names nobody, so that count must be 1, not {self.count}")
        return self


class SamplesConfig(Model):
    """How images are sampled."""

    generator: str = Field(
        default="packs/demo/generator", description="Folder of the generator: an IDiff-Face release."
    )
    w: float = Field(default=0.5, ge=0, le=10, description="Negative weight; 0: no negative.")
    sampler: Sampler = Field(
        default=Sampler.ddim,
        description="The sampler. dpm_solver is DPM-Solver++(2M), dpm_solver_2s its single-step form.",
    )
    steps: int = Field(default=200, ge=1, le=1000, description="Sampling steps; ddpm always takes all of T.")
    spacing: Spacing = Field(
        default=Spacing.karras,
        description="Where dpm_solver spends its steps: karras, or evenly in the log of the signal-to-noise "
        "ratio (log_snr), as good, or in time, which loses faces.",
    )
    precision: Precision = Field(
        default=Precision.fp32,
        description="Number format of the networks: fp32 or bf16; tf32 or fp16 on a GPU alone.",
    )
    seed: Seed = 0
    eta: float = Field(default=0.0, ge=0, le=1, description="DDIM's noise: 0 deterministic, 1 as DDPM.")
    weight: Weight = Field(
        default=Weight.constant,
        description="How the weight moves over the timesteps t: constant, adaptive w (1 - t/T), reverse "
        "w t/T, piecewise along `curve`.",
    )
    curve: str = Field(
        default="",
        description="For the piecewise weight: points t/T:factor, as '0:1 0.5:1 1:0'; pure noise is at 1.",
    )
    cfg: float = Field(
        default=0.0,
        ge=0,
        le=20,
        description="Weight of classifier-free guidance, (1 + cfg) eps(context) - cfg eps(empty context).",
    )
    interval_low: float = Field(
        default=0.0, ge=0, le=1, description="Guidance acts where t/T is at least this (0: the last step)."
    )
    interval_high: float = Field(
        default=1.0, ge=0, le=1, description="Guidance acts where t/T is at most this (1: the first step)."
    )
    transform: Transform = Field(
        default=Transform.none,
        description="idperturb turns the context of each image by a random angle (arXiv 2602.18831).",
    )
    lower_bound: float = Field(
        default=0.6, ge=0, le=1, description="Lowest cosine of a turned context to its identity's."
    )
    safe: bool = Field(
        default=False,
        description="Turn no context further than half way to the nearest other identity of the pool.",
    )
    ddim_alpha: Form = Field(default=Form.exact, description="DDIM's previous alpha; paper: off by one.")
    final_noise: Form = Field(default=Form.exact, description="DDPM's noise at t = 1; paper: none.")

    @model_validator(mode="after")
    def _guidance_makes_sense(self) -> "SamplesConfig":
        if self.interval_low > self.interval_high:
            raise ValueError(
                f"interval_low is {self.interval_low} and interval_high {self.interval_high}: the interval "
                "of guidance is empty; swap them, or set w and cfg to 0 for no guidance"
            )
        if (self.weight == Weight.piecewise) != bool(self.curve):
            need = "needs no `curve`" if self.curve else "needs `curve`, such as '0:1 0.5:1 1:0'"
            raise ValueError(f"the weight {self.weight} {need}")
        if self.safe and self.transform == Transform.none:
            raise ValueError(
                "safe bounds the turn of a transform: set `transform` to idperturb, or safe to false"
            )
        return self


class AlignedConfig(Model):
    """How faces are found and aligned."""

    detector: str = Field(default="packs/demo/faces", description="insightface model pack with the detector.")
    detector_size: int = Field(
        default=128, ge=32, le=1280, multiple_of=32, description="Side of the detector's input, in pixels."
    )
    threshold: float = Field(default=0.5, gt=0, lt=1, description="Lowest detection score that is a face.")
    template: Template = Field(default=Template.arcface, description="Landmark template of the crops.")


class EmbeddingsConfig(Model):
    """How aligned crops are embedded for the evaluation."""

    judge: str = Field(
        default="packs/demo/judge",
        description="insightface model pack with the recogniser that judges; not the generator's own.",
    )
    flip: bool = Field(default=False, description="Add the mirrored crop's embedding.")
    recogniser: Optional = Field(
        default=None,
        description="insightface model pack with the recogniser that samples.generator was trained with: "
        "each image is compared with the context of its identity. Empty: it is not.",
    )
    band_low: float = Field(
        default=-1.0,
        ge=-1,
        le=1,
        description="Images whose cosine to their context is below this are left out of the dataset "
        "(arXiv 2409.18876: moderate similarity trains best).",
    )
    band_high: float = Field(
        default=1.0, ge=-1, le=1, description="Images whose cosine is above this are left out."
    )
    quality: Optional = Field(
        default=None,
        description="ONNX network that gives an aligned 112x112 crop one number, higher for a better "
        "picture. Empty: the norm of the judge's embedding.",
    )
    attributes: Optional = Field(
        default=None,
        description="ONNX network that gives an aligned 112x112 crop a score for each class of an attribute, "
        "or insightface's genderage. Empty: attributes are not counted.",
    )

    @property
    def banded(self) -> bool:
        """Whether images are left out for their similarity to their context."""
        return self.band_low > -1 or self.band_high < 1

    @model_validator(mode="after")
    def _band_makes_sense(self) -> "EmbeddingsConfig":
        if self.band_low > self.band_high:
            raise ValueError(
                f"band_low is {self.band_low} and band_high {self.band_high}: no image is in that band; swap "
                "them, or leave them at -1 and 1"
            )
        if self.banded and self.recogniser is None:
            raise ValueError(
                "a band needs `recogniser`, which says how similar an image is to its context: give the one "
                "that samples.generator was trained with, or leave band_low and band_high at -1 and 1"
            )
        return self


class EvaluationConfig(Model):
    """Which figures are computed."""

    protocol: Protocol = Field(default=Protocol.full, description="Which pairs are scored.")
    bootstrap: int = Field(
        default=200, ge=0, le=10_000, description="Resamples over identities for the confidence intervals."
    )
    match_cosine: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Cosine, by the judge, from which two identities count as one; to compare datasets take "
        "the threshold of FMR 0.1% on real faces. 0: that of this dataset's own impostors.",
    )
    seed: Seed = 0


class BuildConfig(Model):
    """One synthetic dataset. All but name, size and work units changes what an image looks like."""

    name: str = Field(
        default="dataset",
        pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$",
        description="Name of the run: up to 63 lower-case letters, digits, dots, dashes and underscores; "
        "the first is a letter or a digit.",
    )
    identities: int = Field(default=10_050, ge=2, le=10_000_000, description="Identities to make.")
    images: int = Field(default=50, ge=1, le=10_000, description="Images of each identity.")
    contexts: ContextsConfig = Field(
        default_factory=ContextsConfig, description="Identity contexts: one unit vector an identity."
    )
    negatives: NegativesConfig = Field(
        default_factory=NegativesConfig,
        description="Negative contexts: which other identity each identity is pushed away from.",
    )
    samples: SamplesConfig = Field(
        default_factory=SamplesConfig, description="Sampling: which network makes the images, and how."
    )
    aligned: AlignedConfig = Field(
        default_factory=AlignedConfig, description="How faces are found in the images and aligned."
    )
    embeddings: EmbeddingsConfig = Field(
        default_factory=EmbeddingsConfig, description="Who judges the aligned faces, and which are kept."
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Which figures are computed."
    )
    block_identities: int = Field(
        default=8, ge=1, le=4096, description="Identities in one work unit; a store keeps its first choice."
    )
    block_images: int = Field(
        default=50, ge=1, le=4096, description="Images of each identity in one work unit; likewise."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_rule_no_weight(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        sections = [values.get(name) or {} for name in ("negatives", "samples")]
        if not all(isinstance(section, dict | Model) for section in sections):
            return values  # the check of the fields, which follows, names the section that is none
        negatives, samples = map(dict, sections)
        if negatives.get("rule") == Rule.none:
            if samples.setdefault("w", 0.0):
                raise ValueError("negatives.rule is none but samples.w is not 0: set w to 0 or pick a rule")
            values = {**values, "samples": samples}
        return values
