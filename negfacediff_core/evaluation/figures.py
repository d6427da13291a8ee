"""What a report says of a dataset: its settings and figures, their names, form and meaning.

`report.json` holds, in JSON types only:

- `datasets`: a list; each has SETTINGS and the figures of FIGURES that are not optional. It may have `name`,
  `settings` {field: value}, `lineage` {stage: fingerprint}, and for any figure an interval,
  `<figure>_interval` [low, high].
- `seconds`, `device`, `versions` {tool: version} for the whole; `title`, `judge` and `licences`
  [{`part`, `licence`, `source`}] are optional.

A figure that could not be computed is null.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from negfacediff_core.errors import NegFaceDiffError


class Figure(NamedTuple):
    """One row of the table: where it stands in a dataset, how it is shown and explained.

    `better` is +1 where higher is better, -1 where lower is, 0 where neither. `optional` ones may be missing.
    """

    key: str
    title: str
    form: str
    better: int
    definition: str
    optional: bool = False


FIGURES = (
    Figure(
        "fdr",
        "FDR",
        ".2f",
        1,
        "Fisher discriminant ratio, (genuine mean − impostor mean)² / (genuine deviation² + impostor "
        "deviation²): how far apart the two kinds of pairs are, in units of their spread.",
    ),
    Figure(
        "eer",
        "EER",
        ".2%",
        -1,
        "Equal error rate: the error at the threshold where the share of impostor pairs that match equals "
        "the share of genuine pairs that do not.",
    ),
    Figure(
        "fmr100",
        "FMR100",
        ".2%",
        -1,
        "Lowest share of genuine pairs missed while at most 1% of impostors match.",
    ),
    Figure("fmr1000", "FMR1000", ".2%", -1, "The same while at most 0.1% of impostor pairs match."),
    Figure(
        "genuine_mean",
        "Genuine mean",
        ".3f",
        1,
        "Mean cosine similarity of two images of one identity, by the judge: a recogniser other than the one "
        "that made the contexts.",
    ),
    Figure(
        "genuine_std", "Genuine deviation", ".3f", 0, "Population standard deviation of the genuine cosines."
    ),
    Figure(
        "impostor_mean", "Impostor mean", ".3f", -1, "Mean cosine similarity of images of two identities."
    ),
    Figure(
        "impostor_std",
        "Impostor deviation",
        ".3f",
        0,
        "Population standard deviation of the impostor cosines.",
    ),
    Figure(
        "rank1",
        "Rank-1 to the context",
        ".1%",
        1,
        "Share of images whose most similar context is their own, by the recogniser that made the contexts.",
        optional=True,
    ),
    Figure(
        "context_similarity",
        "Similarity to the context",
        ".3f",
        1,
        "Mean cosine of an image with its own context, by the recogniser that made the contexts.",
        optional=True,
    ),
    Figure(
        "detected_fraction",
        "Faces found",
        ".1%",
        1,
        "Share of images in which the detector finds a face; the others are left out of all figures above.",
    ),
    Figure(
        "clipped_fraction",
        "Clipped values",
        ".2%",
        -1,
        "Share of pixel values that the generator put outside the range of an image.",
        optional=True,
    ),
    Figure(
        "negative_cosine",
        "Cosine to the negatives",
        ".3f",
        0,
        "Mean cosine of an identity's context with those that it is pushed away from.",
        optional=True,
    ),
    Figure(
        "images_per_second", "Sampling, images/s", ".2f", 1, "Images sampled per second, decoding included."
    ),
)

#: What every dataset of a report says about how it was made.
SETTINGS = ("rule", "w", "sampler", "steps", "identities", "images")


def check_report(report: Mapping[str, Any]) -> None:
    """Raise NegFaceDiffError, naming the missing keys, unless `report` has what the module lists."""
    missing = [key for key in ("datasets", "seconds", "device", "versions") if key not in report]
    wanted = [*SETTINGS, *(figure.key for figure in FIGURES if not figure.optional)]
    for number, dataset in enumerate(report.get("datasets", ())):
        missing += [f"datasets[{number}].{key}" for key in wanted if key not in dataset]
    if missing or not report["datasets"]:
        raise NegFaceDiffError(
            f"the report lacks {', '.join(missing) or 'any dataset'}: evaluate the dataset again"
        )
