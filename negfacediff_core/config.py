"""What to build (`BuildConfig`, fingerprinted) and how to run it (`ExecutionConfig`, never fingerprinted).

The same models are the Prefect form, the YAML presets, the command line's `--set` and the Python API.
Core functions take plain values, not these objects; only `stages` reads them.
"""

from enum import StrEnum
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

#: Titles of fields in a form, where the name alone does not say it.
TITLES = {
    "aligned": "Alignment",
    "block_identities": "Identities in a work unit",
    "block_images": "Images of each identity in a work unit",
    "cfg": "Classifier-free guidance",
    "ddim_alpha": "Previous alpha of DDIM",
    "eta": "Noise of DDIM (eta)",
    "final_noise": "Final noise of DDPM",
    "fmr": "False match rate",
    "mid": "Median of the rule mid",
    "rand": "Draw of the rule rand",
    "samples": "Sampling",
    "w": "Negative weight (w)",
    "weight": "Course of the weight",
}


def title_of(name: str, field: Any = None) -> str:
    """Return what stands above the field `name` in a form."""
    return TITLES.get(name) or name.replace("_", " ").capitalize()


def _for_forms(schema: dict[str, Any]) -> None:
    """Add the limits of each number to its description, which is all that a form shows.

    A default of null is left out: Prefect refuses null, which whole configurations hold, where one is stated.
    """
    words = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "and below",
        "multipleOf": "in steps of",
    }
    for field in schema.get("properties", {}).values():
        if field.get("default", "") is None:
            del field["default"]
        limits = [f"{said} {_plain(field[key])}" for key, said in words.items() if key in field]
        if limits and "Allowed" not in field["description"]:
            field["description"] = f"{field['description']} Allowed: {' '.join(limits)}."


def _plain(number: float) -> str:
    """Write a limit as people do: 1,000,000 and 0.5."""
    return f"{int(number) if number == int(number) else number:,}"


class Model(BaseModel):
    """Base of every configuration: unknown keys are refused, instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_enum_values=True,
        field_title_generator=title_of,
        json_schema_extra=_for_forms,
    )


#: Something that may be left out: None, or an empty box of a form, which shows no two kinds to choose from.
Optional = Annotated[
    str | None,
    BeforeValidator(lambda value: None if value == "" else value),
    WithJsonSchema({"type": "string"}),
]


class ContextSource(StrEnum):
    """Where identity contexts come from."""

    uniform = "uniform"
    fitted = "fitted"
    file = "file"
    folder = "folder"
    two_stage = "two_stage"
    mixup = "mixup"
    packed = "packed"


#: The fields of `contexts` that a source reads besides `seed` and `max_cosine`; the rest must be left alone.
CONTEXT_FIELDS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "fitted": ("file",),
    "file": ("file",),
    "folder": ("folder", "recogniser", "detector_size"),
    "two_stage": ("generator", "steps", "recogniser", "detector_size"),
    "mixup": ("file", "margin"),
    "packed": ("packing_steps", "count"),
}


class Rule(StrEnum):
    """How the negative of an identity is picked (arXiv 2508.09661)."""

    none = "none"
    null = "null"
    rand = "rand"
    close = "close"
    mid = "mid"
    far = "far"


class RandomRule(StrEnum):
    """`seeded` draws another identity; `ring` takes identity i - 1, as the published code does."""

    seeded = "seeded"
    ring = "ring"


class MedianRule(StrEnum):
    """`corrected` takes the median over the other identities; `paper` includes the identity itself."""

    corrected = "corrected"
    paper = "paper"


class NegativeWeights(StrEnum):
    """`equal` weighs an identity's negatives alike; `rank` in proportion to 1, 1/2, 1/3, ..."""

    equal = "equal"
    rank = "rank"


class Sampler(StrEnum):
    """The reverse-diffusion sampler."""

    ddim = "ddim"
    ddpm = "ddpm"
    dpm_solver = "dpm_solver"
    dpm_solver_2s = "dpm_solver_2s"


class Spacing(StrEnum):
    """Where a DPM-Solver++ spends its steps: evenly in time, in log-SNR, or as arXiv 2206.00364 does."""

    karras = "karras"
    log_snr = "log_snr"
    time = "time"


class Weight(StrEnum):
    """How the negative weight moves with the timestep t (arXiv 2603.29569); piecewise follows a curve."""

    constant = "constant"
    adaptive = "adaptive"
    reverse = "reverse"
    piecewise = "piecewise"


class Transform(StrEnum):
    """What is done to an identity's context anew for each image."""

    none = "none"
    idperturb = "idperturb"


class Form(StrEnum):
    """`exact` is the right formula; `paper` is the published code as it runs."""

    exact = "exact"
    paper = "paper"


class Precision(StrEnum):
    """Number format of the networks while sampling: take fp32 on a CPU, bf16 on a GPU.

    It changes pixels, so that presets name it and nothing chooses it: the same build makes the same images on
    every device that has the format, and an error elsewhere. tf32 and fp16 need a GPU.
    """

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


class Acceleration(StrEnum):
    """How kernels are launched: one by one, as a CUDA graph, or compiled."""

    auto = "auto"
    eager = "eager"
    graphs = "graphs"
    compile = "compile"


class Speed(StrEnum):
    """How it is known how fast the device of a build is: timed, or a stored calibration of such a device."""

    timed = "timed"
    a100 = "a100"
    h100 = "h100"
    xeon_amx = "xeon-amx"


class Template(StrEnum):
    """The landmark template that faces are aligned to."""

    arcface = "arcface"
    legacy = "legacy"


class Protocol(StrEnum):
    """Which pairs are scored: all of them, or the published subset."""

    full = "full"
    paper = "paper"


class Policy(StrEnum):
    """What follows when generated images are alike to somebody in a gallery."""

    report = "report"
    flag = "flag"
    drop = "drop"


Seed = Annotated[int, Field(ge=0, lt=2**63, description="Random seed. Allowed: from 0 to 2^63 - 1.")]


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
        "ratio (log_snr) or in time.",
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


class ExecutionConfig(Model):
    """How a build runs. Nothing here changes a pixel, beyond the tolerance of another batch size."""

    executor: Annotated[str, BeforeValidator(lambda value: "threads" if value == "" else value)] = Field(
        default="threads",
        pattern=r"^(|threads|dask|cuda|slurm|kubernetes|(tcp|tls|ucx|ws|wss)://\S+)$",
        description="threads, dask (local processes), cuda (a process a GPU), slurm (a worker a job), "
        "kubernetes (a worker a pod), or a Dask scheduler, as tcp://scheduler:8786. Empty: threads.",
    )
    workers: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Workers; 0: one a core or GPU. Jobs of slurm, pods of kubernetes, which need a number.",
    )
    adaptive: bool = Field(
        default=False,
        description="Let workers come, up to `workers`, and go with the work: dask, slurm or kubernetes.",
    )
    threads_per_worker: int = Field(default=1, ge=1, le=256, description="CPU threads of each worker.")
    batch_size: int = Field(default=0, ge=0, le=65_536, description="Images a batch; 0: fits the device.")
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where networks run: auto (a GPU where there is one), cpu, cuda, or one GPU as cuda:1.",
    )
    acceleration: Acceleration = Field(
        default=Acceleration.auto,
        description="How the sampler's kernels are launched: eager (one by one), graphs (CUDA graphs), "
        "compile (minutes of warm-up, for long builds), auto (graphs on a GPU, eager elsewhere). Where one "
        "fails, the next slower one is taken, with a message.",
    )
    retries: int = Field(default=2, ge=0, le=20, description="Further rounds over units that failed.")
    approve_above_hours: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="A build that would take more hours than this, by a short timed run, waits for approval: "
        "on the terminal, or paused in Prefect. 0: never.",
    )
    calibration: Speed = Field(
        default=Speed.timed,
        description="How approval knows the speed of the device: timed (in a run of a minute, here or on a "
        "worker of a Dask scheduler), or by what is stored of such devices: slurm and kubernetes cannot be "
        "timed. Of a100 and h100 the least possible time is known alone.",
    )

    @property
    def elsewhere(self) -> bool:
        """Whether units run on other machines than this one."""
        return "://" in self.executor or self.executor in ("slurm", "kubernetes")


class LeakageConfig(Model):
    """The leakage gate: whom generated images are compared with, by whom, and what follows."""

    gallery: str = Field(
        description="Folder of images, one a person or a sub-folder of them a person; or embeddings of one "
        "recogniser: .npz, Parquet or Zarr with `embeddings`, and `names` that tell who it is."
    )
    recognisers: tuple[str, ...] = Field(
        default=(),
        max_length=2,
        description="One or two insightface model packs that did not condition the generator. None: the "
        "judge of the run.",
    )
    detector: Optional = Field(
        default=None, description="Model pack with the detector of the gallery's faces. Empty: the run's."
    )
    detector_size: int = Field(
        default=0, ge=0, le=1280, multiple_of=32, description="Side of its input, in pixels; 0: the run's."
    )
    policy: Policy = Field(
        default=Policy.report,
        description="report: count. flag: list the images that leak in a Parquet file beside the run as "
        "well. drop: make a run without them as well.",
    )
    fmr: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="Images are flagged or dropped at this false match rate of real impostors: 0.001, 0.0001 "
        "or 0.00001.",
    )
    pictures: bool = Field(default=False, description="Draw the most similar pairs.")
