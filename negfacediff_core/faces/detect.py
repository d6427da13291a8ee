"""Faces with five landmarks by an SCRFD detector (arXiv:2105.04714) in insightface's ONNX form."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError, NegFaceDiffError, WeightsError
from negfacediff_core.faces.packs import ColourOrder, Network, network_input, open_network

BATCH = 32
OVERLAP = 0.4
MEAN, STD = 127.5, 128.0
# Number of outputs with landmarks -> strides of the maps and anchors at a position.
LAYOUTS: dict[int, tuple[tuple[int, ...], int]] = {9: ((8, 16, 32), 2), 15: ((8, 16, 32, 64, 128), 1)}


class Faces(NamedTuple):
    """The faces of one image, best first, in pixels of that image."""

    boxes: NDArray[np.float32]  # (M, 4) x0, y0, x1, y1
    scores: NDArray[np.float32]  # (M,) in [0, 1]
    landmarks: NDArray[np.float32]  # (M, 5, 2) in the order of the ArcFace template


class Detector(Protocol):
    """Whatever finds faces with five landmarks, and says which weights do it."""

    weights: Path
    sha256: str
    colour_order: ColourOrder
    input_size: tuple[int, int]

    def detect(self, images: NDArray[np.uint8]) -> list[Faces]:
        """Find the faces of `(N, H, W, 3)` uint8 RGB images: one `Faces` an image, maybe empty."""
        ...


class ScrfdDetector:
    """An SCRFD network in ONNX, run at one input size on images resized with their aspect kept."""

    def __init__(self, network: Network, input_size: int = 128, threshold: float = 0.5) -> None:
        if len(network.output_names) not in LAYOUTS:
            raise WeightsError(
                f"{network.path} is a detector without landmarks ({len(network.output_names)} outputs); "
                "alignment needs the five landmarks of a 9- or 15-output SCRFD."
            )
        self.strides, self.anchors = LAYOUTS[len(network.output_names)]
        if input_size < 1 or input_size % self.strides[-1]:
            raise ConfigError(f"Detector input size {input_size} must be a multiple of {self.strides[-1]}.")
        if not 0 < threshold < 1:
            raise ConfigError(f"Detector threshold {threshold} must lie between 0 and 1.")
        self._network = network
        self.weights = network.path
        self.sha256 = network.sha256
        self.colour_order: ColourOrder = "RGB"
        # A graph of fixed size can be run at that size only.
        self.input_size = network.size or (input_size, input_size)
        self.threshold = threshold

    def detect(self, images: NDArray[np.uint8]) -> list[Faces]:
        """Find the faces of `(N, H, W, 3)` uint8 RGB images that score at least `threshold`."""
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or 0 in images.shape[1:]:
            raise NegFaceDiffError(
                f"Images have shape {images.shape} and type {images.dtype}; the detector takes uint8 RGB of "
                "shape (N, height, width, 3)."
            )

        def prepare(some: NDArray[np.uint8]) -> NDArray[np.float32]:
            return network_input(fit(some, self.input_size)[0], MEAN, STD, self.colour_order)

        # Maps without a batch dimension belong to one image.
        single = self._network.output_ranks[0] == 2
        step = 1 if single else self._network.batch or BATCH
        height, width = images.shape[1:3]
        scale = fitted_size(height, width, self.input_size)[0] / height
        faces: list[Faces] = []
        for outputs in self._network.evaluate(images, step, prepare):
            maps = [one[None] if single else one for one in outputs]
            faces += decode(maps, self.input_size, self.strides, self.anchors, self.threshold, scale)
        return faces


def load_detector(
    source: str | Path,
    input_size: int = 128,
    threshold: float = 0.5,
    threads: int = 1,
    device: str = "cpu",
) -> ScrfdDetector:
    """Load the detector of a model-pack folder, or one ONNX file, onto cpu, cuda or cuda:N.

    `input_size` is the side in pixels of the square that images are fitted into: a multiple of the largest
    stride. Faces much smaller than a tenth of it are missed. Raises WeightsError if there is no detector,
    ConfigError for a GPU that onnxruntime cannot use.
    """
    return ScrfdDetector(open_network(source, "detection", threads, device), input_size, threshold)


def main_face(faces: Faces, height: int, width: int) -> int:
    """Return which face an image is of: large and central, area minus twice its squared offset.

    The offset is of its centre from the image's; a face in a corner must be far larger to win.
    """
    boxes = faces.boxes.astype(np.float64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    offsets = centres - np.array([width, height]) / 2
    return int(np.argmax(areas - 2 * (offsets**2).sum(axis=1)))


def fit(images: NDArray[np.uint8], size: tuple[int, int]) -> tuple[NDArray[np.uint8], float]:
    """Resize `(N, H, W, 3)` uint8 bilinearly, aspect kept, into the top left of black frames.

    `size` is (height, width) of the frames. Returns them and the scale from image to frame pixels. Plain
    bilinear also when shrinking, as insightface feeds its detectors.
    """
    height, width = images.shape[1:3]
    if (height, width) == size:
        return images, 1.0
    new_height, new_width = fitted_size(height, width, size)
    planes = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(planes, (new_height, new_width), mode="bilinear")
    frames = np.zeros((len(images), *size, 3), np.uint8)
    frames[:, :new_height, :new_width] = resized.round_().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return frames, new_height / height


def fitted_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of an image in a frame of `size` (height, width), its aspect kept."""
    if height / width > size[0] / size[1]:
        return size[0], max(1, int(size[0] * width / height))
    return max(1, int(size[1] * height / width)), size[1]


def anchor_centres(size: tuple[int, int], stride: int, anchors: int) -> NDArray[np.float32]:
    """Return the `(h * w * anchors, 2)` centres (x, y) in pixels of one map: multiples of its stride."""
    rows, columns = np.mgrid[: size[0] // stride, : size[1] // stride]
    centres = np.stack([columns, rows], -1).reshape(-1, 1, 2) * stride
    return np.repeat(centres, anchors, 1).reshape(-1, 2).astype(np.float32)


def decode(
    outputs: Sequence[NDArray[np.float32]],
    size: tuple[int, int],
    strides: Sequence[int],
    anchors: int,
    threshold: float,
    scale: float = 1.0,
) -> list[Faces]:
    """Turn the maps of a batch into faces.

    `outputs` are, for each stride, scores `(N, A, 1)`, then for each stride box distances `(N, A, 4)` (left,
    top, right and bottom of the anchor centre), then landmark offsets `(N, A, 10)` (x, y); both in strides.
    """
    levels = len(strides)
    scores = np.concatenate(outputs[:levels], 1)[:, :, 0]
    pixels = np.array(strides, np.float32)
    distances, offsets = (
        np.concatenate([outputs[group * levels + level] * pixels[level] for level in range(levels)], 1)
        for group in (1, 2)
    )
    centres = np.concatenate([anchor_centres(size, stride, anchors) for stride in strides])
    faces = []
    for image in range(len(scores)):
        kept = np.flatnonzero(scores[image] >= threshold)
        kept = kept[np.argsort(-scores[image, kept], kind="stable")]
        centre = centres[kept]
        corners = [centre - distances[image, kept, :2], centre + distances[image, kept, 2:]]
        boxes: NDArray[np.float32] = np.concatenate(corners, 1)
        boxes /= scale
        landmarks: NDArray[np.float32] = centre[:, None] + offsets[image, kept].reshape(-1, 5, 2)
        landmarks /= scale
        best = suppress_overlaps(boxes, OVERLAP)
        faces.append(Faces(boxes[best], scores[image, kept[best]], landmarks[best]))
    return faces


def suppress_overlaps(boxes: NDArray[np.float32], overlap: float) -> NDArray[np.intp]:
    """Greedy non-maximum suppression: indices of the `(M, 4)` boxes, best first, that overlap no better one.

    Overlap is intersection over union, both edges counted as part of a box, as insightface counts.
    """
    kept = []
    order = np.arange(len(boxes))
    corners, sizes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2] + 1
    while order.size:
        best, rest = order[0], order[1:]
        kept.append(best)
        low = np.maximum(corners[best], corners[rest])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.maximum(0, high - low + 1).prod(1)
        union = sizes[best].prod() + sizes[rest].prod(1) - shared
        order = rest[shared / union <= overlap]
    return np.array(kept, np.intp)
