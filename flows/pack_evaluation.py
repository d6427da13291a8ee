"""The figures of a pack's card: context sources and rules over several seeds, through the real pipeline."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prefect import flow

from flows.build import DEFAULT_EXECUTION, build_dataset
from flows.presets import check_build, load_build
from negfacediff_core.config import BuildConfig, ExecutionConfig

IDENTITIES, IMAGES = 64, 16
SEEDS = (0, 1, 2)
# Half the time of fp32 where the CPU has the arithmetic for it.
PRECISION = "bf16"
# Rule and weight; the first is what the others are compared with.
RULES = (("none", 0.0), ("null", 0.5), ("rand", 0.5), ("far", 0.5))
# Source of contexts, and its file in the pack.
SOURCES = (("file", "heldout.npz"), ("fitted", "reference.npz"), ("uniform", None))
FIGURES_FILE = "evaluation.json"


class Case(NamedTuple):
    """One dataset of the evaluation."""

    source: str
    rule: str
    seed: int
    build: BuildConfig


def cases(pack: Path, seeds: Sequence[int] = SEEDS) -> Iterator[Case]:
    """Yield the datasets: the demo preset with each source, seed and rule, source by source."""
    demo = load_build("demo").model_dump()
    for source, file in SOURCES:
        for seed in seeds:
            for rule, w in RULES:
                values = {
                    **demo,
                    "name": f"pack-{source}-{rule}-{seed}",
                    "identities": IDENTITIES,
                    "images": IMAGES,
                    "block_images": IMAGES,
                    "contexts": {
                        "source": source,
                        "file": file and str(pack / "contexts" / file),
                        "seed": seed,
                    },
                    "negatives": {**demo["negatives"], "rule": rule, "seed": seed},
                    "samples": {
                        **demo["samples"],
                        "generator": str(pack / "generator"),
                        "seed": seed,
                        "w": w,
                        "precision": PRECISION,
                    },
                    "aligned": {**demo["aligned"], "detector": str(pack / "faces")},
                    "embeddings": {
                        **demo["embeddings"],
                        "judge": str(pack / "judge"),
                        "recogniser": str(pack / "faces"),
                    },
                }
                yield Case(source, rule, seed, check_build(values, "the evaluation of the pack"))


@flow(name="evaluate-pack")
def evaluate_pack(
    pack: Path, store: str, execution: ExecutionConfig = DEFAULT_EXECUTION, seeds: Sequence[int] = SEEDS
) -> list[dict[str, Any]]:
    """Build every case in `store` and write its figures to `pack`/evaluation.json; returns them.

    Each case is written as it is done; running it again goes on where it stopped.
    """
    rows: list[dict[str, Any]] = []
    for case in cases(pack, seeds):
        figures = build_dataset(case.build, execution, store)["figures"]
        rows.append({"source": case.source, "seed": case.seed, **figures})
        (pack / FIGURES_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows
