"""The choices that configurations offer by name."""

from enum import StrEnum


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
