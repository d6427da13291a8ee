"""Stage `aligned`: the face of each image, found and brought to the 112x112 template."""

import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import NegFaceDiffError
from negfacediff_core.faces.align import TEMPLATE_96_LEGACY, TEMPLATE_112, similarity_transform, warp
from negfacediff_core.faces.detect import Faces, main_face
from negfacediff_core.stages.models import (
    describe_device,
    detector_of,
    faces_device_of,
    named,
    network_weight,
)
from negfacediff_core.store.layout import ArraySpec, StageSpec, Unit
from negfacediff_core.store.records import Record
from negfacediff_core.store.shards import commit, read_arrays, read_rows
from negfacediff_core.store.tables import rows_of

VERSION = 1
SIZE = 112
TEMPLATES = {"arcface": TEMPLATE_112, "legacy": TEMPLATE_96_LEGACY}
# In the order of the template; left and right as they lie in the image.
LANDMARKS = tuple(
    f"{point}_{axis}"
    for point in ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
    for axis in ("x", "y")
)
COLUMNS = (
    ("identity", "int64"),
    ("replicate", "int64"),
    ("status", "string"),
    ("error", "string"),
    ("faces", "int64"),
    ("score", "float32"),
    *((landmark, "float32") for landmark in LANDMARKS),
)


def plan(build: BuildConfig, store: str, upstream: Mapping[str, StageSpec]) -> StageSpec:
    """Describe the stage; the detector is loaded."""
    settings, samples = build.aligned, upstream["samples"]
    with named("aligned.detector"):
        weight = network_weight(settings.detector, "detection")
        detector_of(weight, settings.detector_size, settings.threshold, threads=1)
    return StageSpec(
        store=store,
        name="aligned",
        version=VERSION,
        config={name: getattr(settings, name) for name in ("detector_size", "threshold", "template")},
        inputs={"samples": samples.fingerprint},
        grid=samples.grid,
        weights={"detector": weight},
        arrays=(ArraySpec("image", "u1", (SIZE, SIZE, 3)),),
        columns=COLUMNS,
    )


def run_unit(spec: StageSpec, unit: Unit, execution: ExecutionConfig) -> Record:
    """Find and align the faces of a unit; an image without one keeps its row and a black crop."""
    started, begun = time.time(), time.perf_counter()
    samples, device = spec.input("samples"), faces_device_of(execution)
    images, sampled = read_arrays(samples, unit)["image"], read_rows(samples, unit)
    detector = detector_of(
        spec.weights["detector"],
        spec.config["detector_size"],
        spec.config["threshold"],
        execution.threads_per_worker,
        device,
    )
    seconds = {"read": time.perf_counter() - begun}

    begun = time.perf_counter()
    flat = images.reshape(-1, *images.shape[2:])
    found = detector.detect(flat)
    seconds["detect"] = time.perf_counter() - begun

    begun = time.perf_counter()
    crops = np.zeros((len(flat), SIZE, SIZE, 3), np.uint8)
    template = TEMPLATES[spec.config["template"]]
    columns: dict[str, list] = {name: [] for name, _ in spec.columns}
    columns["identity"] = sampled.column("identity").to_pylist()
    columns["replicate"] = sampled.column("replicate").to_pylist()
    for index, (faces, status) in enumerate(zip(found, sampled.column("status").to_pylist(), strict=True)):
        row = _align_one(flat[index], faces, status, template, crops[index])
        for name, value in row.items():
            columns[name].append(value)
    seconds["align"] = time.perf_counter() - begun
    return commit(
        spec,
        unit,
        arrays={"image": crops.reshape(*images.shape[:2], SIZE, SIZE, 3)},
        rows=rows_of(spec, columns),
        started=started,
        seconds=seconds,
        device=describe_device(device),
    )


def _align_one(
    image: NDArray[np.uint8], faces: Faces, sampled: str, template: NDArray, crop: NDArray[np.uint8]
) -> dict[str, object]:
    """Fill `crop` with the aligned main face and return the image's row."""
    nothing = {"faces": len(faces.scores), "score": None, **dict.fromkeys(LANDMARKS)}
    if sampled != "ok":
        return {**nothing, "status": "failed", "error": "its image was not sampled", "faces": 0}
    if not len(faces.scores):
        return {**nothing, "status": "no_face", "error": None}
    chosen = main_face(faces, *image.shape[:2])
    landmarks = faces.landmarks[chosen]
    row = {**nothing, "score": float(faces.scores[chosen])}
    row |= dict(zip(LANDMARKS, landmarks.ravel().tolist(), strict=True))
    try:
        crop[:] = warp(image, similarity_transform(landmarks, template), SIZE)
    except NegFaceDiffError as error:
        return {**row, "status": "failed", "error": str(error)}
    return {**row, "status": "ok", "error": None}
