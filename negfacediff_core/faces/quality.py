"""What networks say of a single face beside its identity: how good a picture it is, and attributes.

Any ONNX network of faces with one output serves: one number a face is a quality (as eDifFIQA, CR-FIQA), K
numbers are the scores of K classes, and insightface's `genderage` has its own form.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from negfacediff_core.errors import StoppedError, WeightsError
from negfacediff_core.faces.align import TEMPLATE_112, similarity_transform, warp_batch
from negfacediff_core.faces.packs import ColourOrder, check_crops, network_input, open_file

BATCH = 32
SIZE = 112
# insightface cuts the square of 1.5 times a detection's longer side for `genderage`. Detections are not kept;
# a face's is taken to be 3.3 eye distances high, forehead to chin, as it is on average of the rendered faces.
GENDERAGE_SIZE = 96
_SQUARE, _MIDDLE = 1.5 * 3.3 * 35.2, (56.0, 68.5)
GENDERAGE_TEMPLATE: NDArray[np.float64] = (TEMPLATE_112 - np.array(_MIDDLE)) * (
    GENDERAGE_SIZE / _SQUARE
) + GENDERAGE_SIZE / 2
#: Classes of `genderage`, in the order of its outputs.
GENDERS = ("female", "male")


class FaceScorer:
    """A network that gives each aligned crop `width` numbers.

    `input_size` is the side of its crops: 112, on the ArcFace template, or 96, as `genderage_crops` cuts
    them. Mean and deviation of the input are 127.5, or 0 and 1 if the graph normalises.
    """

    def __init__(self, network_path: Path, threads: int, device: str) -> None:
        network = open_file(network_path, threads, device)
        size = network.size or (SIZE, SIZE)
        if len(network.output_names) != 1 or size not in ((SIZE, SIZE), (GENDERAGE_SIZE, GENDERAGE_SIZE)):
            raise WeightsError(
                f"{network.path} takes images of {size[0]}x{size[1]} and has {len(network.output_names)} "
                f"outputs: give a network of aligned faces of {SIZE}x{SIZE} with one output."
            )
        self._network = network
        self.weights, self.sha256, self.input_size = network.path, network.sha256, size[0]
        self.colour_order: ColourOrder = "RGB"
        self.mean, self.std = _normalisation(network.normalises_inside, self.input_size)
        self.width = self._run(np.zeros((1, *size, 3), np.uint8)).shape[1]

    def score(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Score `(N, input_size, input_size, 3)` uint8 RGB crops: `(N, width)` float32.

        Raises NegFaceDiffError for crops of another shape or type.
        """
        check_crops(crops, self.input_size, self.weights.name)
        return self._run(crops) if len(crops) else np.zeros((0, self.width), np.float32)

    def _run(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        def prepare(some: NDArray[np.uint8]) -> NDArray[np.float32]:
            return network_input(some, self.mean, self.std, self.colour_order)

        try:
            outputs = list(self._network.evaluate(crops, self._network.batch or BATCH, prepare))
        except StoppedError:
            raise
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise WeightsError(f"{self.weights} does not run on {SIZE}x{SIZE} RGB images: {error}") from error
        scores = np.concatenate([np.asarray(scores, np.float32).ravel() for (scores,) in outputs])
        return scores.reshape(len(crops), -1)


class Attributes(NamedTuple):
    """The class of each face `(N,)` int64 and, by `genderage` alone, the age in years `(N,)` float32."""

    attribute: NDArray[np.int64]
    age: NDArray[np.float32] | None


def load_quality(source: str | Path, threads: int = 1, device: str = "cpu") -> FaceScorer:
    """Load a quality network: one number for each aligned 112x112 crop, higher is better.

    `device` is cpu, cuda or cuda:N. Raises WeightsError for a file that is missing, no network, or of another
    form, and ConfigError for a GPU that onnxruntime cannot use.
    """
    scorer = FaceScorer(_file(source), threads, device)
    if (scorer.width, scorer.input_size) != (1, SIZE):
        raise WeightsError(
            f"{scorer.weights} gives {scorer.width} numbers for a crop of {scorer.input_size} pixels; a "
            f"quality network gives one for a crop of {SIZE}."
        )
    return scorer


def load_attributes(source: str | Path, threads: int = 1, device: str = "cpu") -> FaceScorer:
    """Load an attribute network: class scores of aligned 112x112 crops, or insightface's `genderage`.

    `device` is cpu, cuda or cuda:N. Raises WeightsError for a file that is missing, no network, or of another
    form, and ConfigError for a GPU that onnxruntime cannot use.
    """
    scorer = FaceScorer(_file(source), threads, device)
    if scorer.width < 2 or (scorer.input_size == GENDERAGE_SIZE and scorer.width != 3):
        raise WeightsError(
            f"{scorer.weights} gives {scorer.width} numbers for a crop of {scorer.input_size} pixels; an "
            f"attribute network gives one a class, at least two, for a crop of {SIZE}, or female, male and "
            f"age for one of {GENDERAGE_SIZE}."
        )
    return scorer


def is_genderage(scorer: FaceScorer) -> bool:
    """Whether an attribute network has the form of insightface's `genderage`."""
    return scorer.input_size == GENDERAGE_SIZE


def genderage_crops(images: NDArray[np.uint8], landmarks: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Cut what `genderage` looks at from `(N, H, W, 3)` uint8 RGB images with `(N, 5, 2)` landmarks.

    Returns `(N, 96, 96, 3)` uint8: wider than a crop for recognition, black outside the image. insightface
    does not turn the face upright first, and takes the size from the detection, so that results differ a
    little from its own.
    """
    return warp_batch(images, similarity_transform(landmarks, GENDERAGE_TEMPLATE), GENDERAGE_SIZE)


def attributes_of(scorer: FaceScorer, crops: NDArray[np.uint8]) -> Attributes:
    """Classify crops `(N, input_size, input_size, 3)`: the class of the highest score, the first on a tie."""
    scores = scorer.score(crops)
    if not is_genderage(scorer):
        return Attributes(scores.argmax(axis=1), None)
    return Attributes(scores[:, :2].argmax(axis=1), 100 * scores[:, 2])


def _normalisation(inside: bool, size: int) -> tuple[float, float]:
    # insightface feeds genderage raw pixels whether the graph normalises or not.
    return (0.0, 1.0) if inside or size == GENDERAGE_SIZE else (127.5, 127.5)


def _file(source: str | Path) -> Path:
    path = Path(source)
    if not path.is_file():
        raise WeightsError(f"There is no file {path}: give one ONNX file.")
    return path
