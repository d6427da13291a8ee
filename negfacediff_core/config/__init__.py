"""What to build (`BuildConfig`, fingerprinted) and how to run it (`ExecutionConfig`, never fingerprinted).

The same models are the Prefect form, the YAML presets, the command line's `--set` and the Python API.
Core functions take plain values, not these objects; only `stages` reads them.
"""

from negfacediff_core.config.choices import (
    CONTEXT_FIELDS,
    Acceleration,
    ContextSource,
    Form,
    MedianRule,
    NegativeWeights,
    Policy,
    Precision,
    Protocol,
    RandomRule,
    Rule,
    Sampler,
    Spacing,
    Speed,
    Template,
    Transform,
    Weight,
)
from negfacediff_core.config.dataset import (
    AlignedConfig,
    BuildConfig,
    ContextsConfig,
    EmbeddingsConfig,
    EvaluationConfig,
    NegativesConfig,
    SamplesConfig,
)
from negfacediff_core.config.execution import ExecutionConfig
from negfacediff_core.config.leakage import LeakageConfig
from negfacediff_core.config.model import TITLES, Model, Optional, OptionalNumber, Seed, title_of

__all__ = [
    "CONTEXT_FIELDS",
    "TITLES",
    "Acceleration",
    "AlignedConfig",
    "BuildConfig",
    "ContextSource",
    "ContextsConfig",
    "EmbeddingsConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "Form",
    "LeakageConfig",
    "MedianRule",
    "Model",
    "NegativeWeights",
    "NegativesConfig",
    "Optional",
    "OptionalNumber",
    "Policy",
    "Precision",
    "Protocol",
    "RandomRule",
    "Rule",
    "Sampler",
    "SamplesConfig",
    "Seed",
    "Spacing",
    "Speed",
    "Template",
    "Transform",
    "Weight",
    "title_of",
]
