"""The figures that a report shows of a dataset, their names, form and meaning, and its settings."""

from typing import NamedTuple


class Figure(NamedTuple):
    """One row of the table: where it stands in a dataset, how it is shown and explained.

    `better` is +1 where higher is better, -1 where lower is, 0 where neither. `optional` ones may be missing.
    `group` is the heading that it stands under: one of GROUPS.
    """

    key: str
    title: str
    form: str
    better: int
    definition: str
    optional: bool = False
    group: str = "Separability"


#: The headings of the table of figures, in order.
GROUPS = ("Separability", "Identities", "Contexts", "Images", "Cost")

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
    Figure("zero_fmr", "ZeroFMR", ".2%", -1, "The same while no impostor pair matches.", optional=True),
    Figure(
        "fmr100_closest",
        "FMR100, closest",
        ".2%",
        -1,
        "Share of genuine pairs missed at the threshold whose FMR is closest to 1%, above or below.",
        optional=True,
    ),
    Figure(
        "fmr1000_closest",
        "FMR1000, closest",
        ".2%",
        -1,
        "The same at the threshold whose FMR is closest to 0.1%.",
        optional=True,
    ),
    Figure(
        "zero_fmr_closest",
        "ZeroFMR, closest",
        ".2%",
        -1,
        "The same at the lowest observed threshold whose FMR is closest to 0.",
        optional=True,
    ),
    Figure(
        "auc",
        "AUC",
        ".4f",
        1,
        "Area under the ROC curve: the chance that a genuine pair is more similar than an impostor pair.",
        optional=True,
    ),
    Figure(
        "decidability",
        "Decidability",
        ".2f",
        1,
        "Difference of the means over the root mean square of both deviations: √(2 FDR).",
        optional=True,
    ),
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
        group="Contexts",
    ),
    Figure(
        "context_similarity",
        "Similarity to the context",
        ".3f",
        1,
        "Mean cosine of an image with its own context, by the recogniser that made the contexts.",
        optional=True,
        group="Contexts",
    ),
    Figure(
        "detected_fraction",
        "Faces found",
        ".1%",
        1,
        "Share of images in which the detector finds a face; the others are left out of all figures above.",
        group="Images",
    ),
    Figure(
        "kept_images",
        "Images kept",
        ",",
        0,
        "Images that the dataset is made of: those in which a face was found and embedded, without those "
        "that leak or lie outside the band, where that was asked for.",
        optional=True,
        group="Images",
    ),
    Figure(
        "kept_fraction",
        "Share of images kept",
        ".1%",
        0,
        "Images kept among all that were asked for.",
        optional=True,
        group="Images",
    ),
    Figure(
        "clipped_fraction",
        "Clipped values",
        ".2%",
        -1,
        "Share of pixel values that the generator put outside the range of an image.",
        optional=True,
        group="Images",
    ),
    Figure(
        "negative_cosine",
        "Cosine to the negatives",
        ".3f",
        0,
        "Mean cosine of an identity's context with those that it is pushed away from.",
        optional=True,
        group="Contexts",
    ),
    Figure(
        "embedding_diversity",
        "Diversity of embeddings",
        ".3f",
        0,
        "1 − mean genuine cosine, as the mean over identities: how much the images of one person differ to"
        " the judge. More trains better, until they stop being that person.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "angular_spread",
        "Angular spread, °",
        ".1f",
        0,
        "Mean angle between an image's embedding and the centre of the other images of its identity, as "
        "the mean over identities.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "centre_least",
        "Least cosine to the centre",
        ".3f",
        0,
        "The least cosine of an identity's images to the centre of its other images, as the mean over "
        "identities.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "pixel_diversity",
        "Diversity of pixels",
        ".1f",
        0,
        "Root mean square difference of two aligned crops of one identity, averaged over 4 × 4 pixels, in "
        "levels of 255; mean over pairs, then over identities.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "near_duplicate_fraction",
        "Near-duplicates",
        ".2%",
        -1,
        "Share of the pairs of images of one identity that are copies to the judge (cosine of at least "
        "0.95) and in pixels (at most 10 levels apart).",
        optional=True,
        group="Identities",
    ),
    Figure(
        "collapsed_fraction",
        "Identities with near-duplicates",
        ".1%",
        -1,
        "Share of identities of which at least one pair is a near-duplicate.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "stray_fraction",
        "Strays",
        ".2%",
        -1,
        "Share of images that are nearer, by the judge, to the centre of another identity than to that of "
        "the other images of their own.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "unique_identities",
        "Distinct identities",
        ",",
        1,
        "Identities that remain when each must be apart from those before it: the cosine of their centres "
        "is below the match threshold.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "unique_fraction",
        "Share of distinct identities",
        ".1%",
        1,
        "Distinct identities among those that were asked for.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "capacity",
        "Capacity",
        ",.0f",
        1,
        "How many equally likely and clearly different identities would match as often as these do: pairs "
        "of centres over pairs that match. n/a where none match.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "match_cosine",
        "Match threshold",
        ".3f",
        0,
        "Cosine from which two identities count as one: that of FMR 0.1% among this dataset's own "
        "impostors, or the one that was set; only with one threshold do datasets compare.",
        optional=True,
        group="Identities",
    ),
    Figure(
        "out_of_band_fraction",
        "Outside the band",
        ".1%",
        0,
        "Share of images that were left out because their similarity to the context is outside the band "
        "that was asked for.",
        optional=True,
        group="Contexts",
    ),
    Figure(
        "context_dimensions",
        "Effective dimensions",
        ".1f",
        1,
        "1 / mean squared cosine of two contexts: the width of the contexts where they are drawn evenly "
        "over the sphere, less where they crowd.",
        optional=True,
        group="Contexts",
    ),
    Figure(
        "context_nearest_cosine",
        "Nearest other context",
        ".3f",
        -1,
        "Mean cosine of a context to the most similar other one.",
        optional=True,
        group="Contexts",
    ),
    Figure(
        "context_nearest_cosine_even",
        "Nearest, drawn evenly",
        ".3f",
        0,
        "The same mean for as many directions that are drawn evenly over the sphere.",
        optional=True,
        group="Contexts",
    ),
    Figure(
        "quality",
        "Quality",
        ".2f",
        1,
        "Mean of the quality network or, without one, of the norm of the judge's embedding.",
        optional=True,
        group="Images",
    ),
    Figure(
        "detection_score",
        "Detection score",
        ".3f",
        1,
        "Mean score that the detector gives the faces that were aligned.",
        optional=True,
        group="Images",
    ),
    Figure(
        "several_faces_fraction",
        "Several faces",
        ".2%",
        -1,
        "Share of the images with a face in which the detector finds more than one.",
        optional=True,
        group="Images",
    ),
    Figure(
        "yaw_deviation",
        "Deviation of yaw, °",
        ".1f",
        0,
        "Standard deviation of the turn to the left or right, estimated from five landmarks.",
        optional=True,
        group="Images",
    ),
    Figure(
        "pitch_deviation",
        "Deviation of pitch, °",
        ".1f",
        0,
        "Standard deviation of the look up or down, estimated from five landmarks.",
        optional=True,
        group="Images",
    ),
    Figure(
        "roll_deviation",
        "Deviation of roll, °",
        ".1f",
        0,
        "Standard deviation of the tilt in the image, estimated from five landmarks.",
        optional=True,
        group="Images",
    ),
    Figure(
        "evenness",
        "Balance of the attribute",
        ".3f",
        1,
        "Entropy of the shares of the attribute's classes over its greatest value: 1 where all are equally"
        " frequent, 0 where there is one.",
        optional=True,
        group="Images",
    ),
    Figure(
        "age",
        "Age, years",
        ".1f",
        0,
        "Mean age by the attribute network.",
        optional=True,
        group="Images",
    ),
    Figure(
        "network_evaluations",
        "Network evaluations an image",
        ",.0f",
        -1,
        "How often the generator's network is evaluated for one image: once a step for the context, and once "
        "for each thing that it is guided away from where that has a weight.",
        optional=True,
        group="Cost",
    ),
    Figure(
        "images_per_second",
        "Sampling, images/s",
        ".2f",
        1,
        "Images sampled per second, decoding included.",
        group="Cost",
    ),
    Figure(
        "seconds",
        "Work, s",
        ",.1f",
        -1,
        "Time in which some unit of the dataset's stages was being worked on; stages that datasets share "
        "count in each.",
        optional=True,
        group="Cost",
    ),
    Figure(
        "watt_hours",
        "Energy, Wh",
        ",.2f",
        -1,
        "What the machine's processors and GPUs used while the dataset was made, whatever else they did.",
        optional=True,
        group="Cost",
    ),
)

#: What every dataset of a report says about how it was made.
SETTINGS = ("rule", "w", "sampler", "steps", "identities", "images")
