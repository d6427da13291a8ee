"""Training of the demo pack's detector on rendered faces, and its export as part of a model pack."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.faces.detect import MEAN, STD, Faces, decode, fit
from negfacediff_core.faces.detector_frames import LabelledImages, draw_empty, draw_frames
from negfacediff_core.faces.detector_loss import box_overlap, detection_loss, make_anchors
from negfacediff_core.faces.detector_network import ANCHORS, STRIDES, DetectorNetwork
from negfacediff_core.faces.packs import network_input
from negfacediff_core.tensor_files import read_tensors, write_tensors

if TYPE_CHECKING:  # rendering needs an extra that training does not
    from negfacediff_core.renders.dataset import RenderSet

CHECKPOINT = "detector.pt"
CURVE_EVERY = 20  # steps between points of the loss curve kept in the checkpoint
OUTPUT_NAMES = [f"{name}_{stride}" for name in ("score", "box", "landmarks") for stride in STRIDES]


@dataclass(frozen=True)
class DetectorSettings:
    """Everything that shapes the trained weights; the defaults are those of the shipped detector."""

    seed: int = 0
    steps: int = 3000
    batch: int = 32
    size: int = 128  # pixels, side of the square input
    learning_rate: float = 3e-3
    warm_up: int = 100  # steps
    weight_decay: float = 0.01
    held_out: float = 0.05  # share of the identities that are kept for the figures
    bfloat16: bool = True


def train_detector(
    sets: dict[str, "RenderSet"],
    folder: str | Path,
    settings: DetectorSettings = DetectorSettings(),
    save_every: int = 200,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, float]:
    """Train the detector for a fixed number of steps and return figures on held-out faces.

    `sets` names render sets, drawn from in equal shares; the last `held_out` share of the identities of each
    is never trained on. `folder/detector.pt` is replaced atomically every `save_every` steps; where it
    exists, training goes on from it and ends with the weights of an uninterrupted run. `progress(step,
    steps, loss)` is called after every step. Raises ConfigError if the checkpoint has other settings.

    Figures, per set: `<set>_recall` (share of faces found with score and overlap of at least .5),
    `<set>_landmark_error` (mean distance of the found landmarks in eye distances), and `false_positives`
    (share of frames without a face, as many as held-out images, in which one is found).
    """
    path = Path(folder) / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    sources, held_out = [], {}
    for name, faces in sets.items():
        border = len(faces.images) - max(1, round(len(faces.images) * settings.held_out))
        sources.append(_flatten(faces, slice(border)))
        held_out[name] = _flatten(faces, slice(border, None))
    network, optimiser, start, curve = _resume(path, settings)
    anchors = make_anchors(settings.size)
    network.train()
    for step in range(start, settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings)
        frames = draw_frames(
            sources, settings.batch, settings.size, np.random.default_rng([settings.seed, step])
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            outputs = network(frames.pixels.contiguous(memory_format=torch.channels_last))
        losses = detection_loss(outputs, frames.boxes, frames.landmarks, frames.present, anchors)
        loss = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimiser.step()
        done = step + 1
        if done % CURVE_EVERY == 0:
            curve.append((done, loss.item()))
        if done % save_every == 0 or done == settings.steps:
            _save(path, settings, network, optimiser, done, curve)
        if progress is not None:
            progress(done, settings.steps, loss.item())
    return evaluate_detector(network, held_out, settings)


def learning_rate(step: int, settings: DetectorSettings) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    rise = min(1.0, (step + 1) / settings.warm_up)
    return settings.learning_rate * rise * 0.5 * float(1 + np.cos(np.pi * step / settings.steps))


def evaluate_detector(
    network: DetectorNetwork, held_out: dict[str, LabelledImages], settings: DetectorSettings
) -> dict[str, float]:
    """Recall and landmark error on each held-out set, and false positives on frames without a face."""
    network.eval()
    figures: dict[str, float] = {}
    for name, labelled in held_out.items():
        frames, scale = fit(labelled.images, (settings.size, settings.size))
        found = _detect(network, frames, scale)
        figures |= {f"{name}_{key}": value for key, value in compare_faces(found, labelled).items()}
    random = np.random.default_rng([settings.seed, settings.steps])
    count = sum(len(labelled.images) for labelled in held_out.values())
    empty = draw_empty(list(held_out.values()), count, settings.size, random)
    faces = _detect(network, empty.permute(0, 2, 3, 1).round().to(torch.uint8).numpy(), 1.0)
    figures["false_positives"] = float(np.mean([len(image.scores) > 0 for image in faces]))
    return figures


def compare_faces(found: Sequence[Faces], truth: LabelledImages) -> dict[str, float]:
    """Compare the best face of each image with the true one: `recall` and mean `landmark_error`."""
    errors = []
    for faces, box, landmarks in zip(found, truth.boxes, truth.landmarks, strict=True):
        if not len(faces.scores):
            continue
        overlap, _ = box_overlap(torch.from_numpy(faces.boxes[:1]), torch.from_numpy(box[None]))
        if overlap.item() >= 0.5:
            eyes = np.linalg.norm(landmarks[1] - landmarks[0])
            # Eyes of a face turned far away come close together: bound the unit by the size of the face.
            unit = max(eyes, 0.25 * float(np.sqrt(np.prod(box[2:] - box[:2]))))
            errors.append(np.linalg.norm(faces.landmarks[0] - landmarks, axis=1).mean() / unit)
    error = float(np.mean(errors)) if errors else float("nan")
    return {"recall": len(errors) / max(len(found), 1), "landmark_error": error}


def export_detector(checkpoint: str | Path, path: str | Path) -> None:
    """Write the detector of a training checkpoint as an ONNX file that a model pack can hold."""
    network = DetectorNetwork()
    network.load_state_dict(_load(Path(checkpoint))["network"])
    export_network(network, path)


def export_network(network: DetectorNetwork, path: str | Path) -> None:
    """Write `network` as ONNX in insightface's SCRFD form, for any batch and size.

    The input is `(batch, 3, height, width)` float32 RGB, (x - 127.5) / 128, height and width multiples of 32.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # The newer exporter needs a package that nothing else here needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 3, 128, 128),),
            path,
            input_names=["frames"],
            output_names=OUTPUT_NAMES,
            dynamic_axes={"frames": {0: "batch", 2: "height", 3: "width"}}
            | {name: {0: "batch", 1: "anchors"} for name in OUTPUT_NAMES},
            opset_version=17,
            dynamo=False,
        )


def _flatten(faces: "RenderSet", identities: slice) -> LabelledImages:
    images, boxes, landmarks = faces.images[identities], faces.boxes[identities], faces.landmarks[identities]
    side = images.shape[2]
    return LabelledImages(
        images.reshape(-1, side, side, 3), boxes.reshape(-1, 4), landmarks.reshape(-1, 5, 2)
    )


def _resume(
    path: Path, settings: DetectorSettings
) -> tuple[DetectorNetwork, torch.optim.Optimizer, int, list[tuple[int, float]]]:
    """Network, optimiser, steps done and loss curve: from the checkpoint at `path`, or fresh ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = DetectorNetwork()
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=settings.weight_decay)
    if not path.exists():
        return network, optimiser, 0, []
    state = _load(path)
    if state["settings"] != asdict(settings):
        raise ConfigError(
            f"{path} was trained with other settings ({state['settings']}): go on with those, or train "
            "into another folder."
        )
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    return network, optimiser, state["step"], state["curve"]


def _load(path: Path) -> dict[str, Any]:
    try:
        return read_tensors(path, "cpu")
    except Exception as error:  # torch raises a different type for each way of being damaged
        raise WeightsError(
            f"{path} is not a readable detector checkpoint ({error}): delete it to train anew, or restore it."
        ) from error


def _save(
    path: Path,
    settings: DetectorSettings,
    network: DetectorNetwork,
    optimiser: torch.optim.Optimizer,
    step: int,
    curve: list[tuple[int, float]],
) -> None:
    state = {
        "settings": asdict(settings),
        "step": step,
        "curve": curve,
        "network": network.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    write_tensors(path, state)


@torch.inference_mode()
def _detect(network: DetectorNetwork, frames: NDArray[np.uint8], scale: float) -> list[Faces]:
    size = (frames.shape[1], frames.shape[2])
    faces: list[Faces] = []
    for start in range(0, len(frames), 64):
        pixels = torch.from_numpy(network_input(frames[start : start + 64], MEAN, STD, "RGB"))
        outputs = [maps.numpy() for maps in network(pixels)]
        faces += decode(outputs, size, STRIDES, ANCHORS, 0.5, scale)
    return faces
