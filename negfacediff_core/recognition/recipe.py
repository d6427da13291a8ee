"""How a recogniser is trained (`RecogniserConfig`), which decides the result, and where."""

from enum import StrEnum

from pydantic import Field, model_validator

from negfacediff_core.config import Model, Seed

#: The batch that `learning_rate` is meant for, as the field states it.
RATE_BATCH = 512


class Backbone(StrEnum):
    """Networks by name; `small` is that of the demo pack, for a CPU."""

    iresnet18 = "iresnet18"
    iresnet34 = "iresnet34"
    iresnet50 = "iresnet50"
    iresnet100 = "iresnet100"
    small = "small"


class Head(StrEnum):
    """Margin losses: arXiv 1801.09414, 1801.07698, 2109.09416 (its form Cos), 2204.00964."""

    cosface = "cosface"
    arcface = "arcface"
    elasticface = "elasticface"
    adaface = "adaface"


class Augmentation(StrEnum):
    """What RandAugment draws from: `POLICIES` of `randaugment`."""

    fixed = "fixed"
    idiff_face = "idiff-face"


class Schedule(StrEnum):
    """`steps` lowers the rate at given epochs, `plateau` where held-out identities gain no more, `cosine`
    continuously to zero.
    """

    steps = "steps"
    plateau = "plateau"
    cosine = "cosine"


class TrainingPrecision(StrEnum):
    """Of the network; cosines and margins are float32 in all of them, and so are the weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


#: What `margin` -1 stands for.
PUBLISHED_MARGINS = {"cosface": 0.35, "arcface": 0.5, "elasticface": 0.35, "adaface": 0.4}


class RecogniserConfig(Model):
    """A recipe: network, head, optimiser, augmentation. With a training set it decides the result."""

    backbone: Backbone = Field(default=Backbone.iresnet50, description="The network.")
    width: int = Field(default=512, ge=8, le=4096, description="Numbers of an embedding.")
    start: str = Field(
        default="",
        description="Weights to start from: a training's folder, or an iResNet file of ElasticFace or "
        "insightface. Empty: random weights.",
    )
    dropout: float = Field(default=0.4, ge=0, lt=1, description="Before the last layer.")
    head: Head = Field(default=Head.cosface, description="The margin loss.")
    scale: float = Field(default=64.0, gt=0, le=1024, description="What cosines are multiplied with (s).")
    margin: float = Field(
        default=-1.0,
        ge=-1,
        le=1.5,
        description="Margin (m). -1: the head's published one, 0.35 (cosface, elasticface), 0.5 (arcface), "
        "0.4 (adaface).",
    )
    epochs: int = Field(default=40, ge=1, le=10_000, description="Passes through the training set.")
    batch_size: int = Field(
        default=512, ge=2, le=65_536, description="Images an optimiser step, over all processes."
    )
    accumulate: int = Field(
        default=1, ge=1, le=1024, description="Parts that a batch is passed through the network in."
    )
    learning_rate: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description="For a batch of 512 images; another batch takes it in proportion.",
    )
    schedule: Schedule = Field(
        default=Schedule.steps,
        description="When the rate falls. steps: tenfold at the epochs of drops. plateau: tenfold where the "
        "held-out identities gain no more, and the fourth time (or stop) is the end. cosine: to zero.",
    )
    drops: tuple[int, ...] = Field(
        default=(22, 30, 35), description="Epochs, counted from 1, that begin with a tenth of the rate."
    )
    patience: int = Field(default=3, ge=1, le=1000, description="Epochs without gain that plateau waits for.")
    stop: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Epochs without gain that end plateau, however often the rate has fallen. 0: the fourth "
        "fall ends it.",
    )
    warmup: float = Field(default=0.0, ge=0, le=1000, description="Epochs in which the rate rises from zero.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Of SGD.")
    weight_decay: float = Field(default=5e-4, ge=0, le=1, description="Of all weights.")
    clip: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Largest norm of a step's gradients, of the network and of the class centres each; 0: as "
        "they are.",
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="Share of the images that are mirrored.")
    operations: int = Field(
        default=4, ge=0, le=14, description="RandAugment: operations an image; 0: without."
    )
    magnitude: int = Field(default=16, ge=0, le=30, description="RandAugment: their strength.")
    policy: Augmentation = Field(
        default=Augmentation.fixed,
        description="RandAugment: fixed draws from 14 operations, at the strength magnitude. idiff-face, as "
        "that paper's code, from 13 (grey instead of shearing and moving upright), at a strength drawn from "
        "1 to magnitude.",
    )
    erase: float = Field(
        default=0.5, ge=0, le=1, description="Share of the images that lose a random rectangle."
    )
    precision: TrainingPrecision = Field(
        default=TrainingPrecision.bf16,
        description="fp32, bf16 (mixed; as good where the processor has it), or fp16 (mixed, with loss "
        "scaling; GPUs only).",
    )
    held_out: float = Field(
        default=0.02,
        gt=0,
        le=0.5,
        description="Share of the identities, two at least, that are kept from training: on them the best "
        "epoch is chosen.",
    )
    seed: Seed = 0

    @property
    def head_margin(self) -> float:
        """The margin, with the published one in the place of -1."""
        return PUBLISHED_MARGINS[self.head] if self.margin == -1 else self.margin

    @property
    def peak_rate(self) -> float:
        """The learning rate for this batch."""
        return self.learning_rate * self.batch_size / RATE_BATCH

    @model_validator(mode="after")
    def _can_work(self) -> "RecogniserConfig":
        if -1 < self.margin < 0:
            raise ValueError(f"margin is {self.margin}: give 0 to 1.5, or -1 for the head's published one")
        if self.batch_size % self.accumulate or self.batch_size // self.accumulate < 2:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be passed in {self.accumulate} equal parts of two "
                "images at least: change batch_size or accumulate"
            )
        if min(self.drops, default=1) < 1 or list(self.drops) != sorted(set(self.drops)):
            raise ValueError(f"drops {list(self.drops)} are no ascending epochs, counted from 1")
        return self


class TrainingExecution(Model):
    """Where a training runs. Another device, or number of processes or threads, changes the last digits."""

    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda)$",
        description="auto (GPUs where there are some), cpu or cuda.",
    )
    processes: int = Field(
        default=1, ge=1, le=64, description="Processes that share each batch: on GPUs, one a GPU."
    )
    loaders: int = Field(
        default=0, ge=0, le=256, description="Threads a process that decode and vary images; 0: one a core."
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="CPU threads of the network in each process; 0: PyTorch's choice.",
    )
    checkpoint_seconds: float = Field(
        default=120.0, ge=0, le=86_400, description="Work that a kill can cost at most, in seconds."
    )
