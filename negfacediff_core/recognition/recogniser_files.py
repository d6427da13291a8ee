"""Recognisers of any kind of file: ONNX networks, weights of iResNets, and TorchScript."""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.faces.embed import Embedder, load_embedder
from negfacediff_core.faces.packs import PIXELS, ColourOrder, check_crops, network_input
from negfacediff_core.recognition.backbones import INPUT_SIZE, build_backbone
from negfacediff_core.recognition.path_options import parse
from negfacediff_core.tensor_files import read_tensors

#: The weights of the best epoch in the folder of a training.
TRAINED = "best.pt"
SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
#: What a training checkpoint calls the weights of its network, and what wrappers put before each name.
_NESTED = ("state_dict", "state_dict_backbone", "backbone", "model")
_WRAPPERS = re.compile(r"^(module\.|backbone\.|model\.)+")

_OTHERWISE = (
    "export it with the code that it comes with, to ONNX (torch.onnx.export) and give the .onnx file, or to "
    "TorchScript (torch.jit.trace) and give PATH,torchscript=yes."
)


class TorchEmbedder:
    """A recogniser in torch, on a device, in float32: the first output of its network.

    Raises WeightsError for a network that does not take crops of 112x112, or gives no embedding of each.
    """

    input_size = INPUT_SIZE

    def __init__(self, path: Path, network: nn.Module, device: str, colour_order: ColourOrder) -> None:
        self.weights = path
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.colour_order: ColourOrder = colour_order
        self.mean, self.std = PIXELS["-1..1"]
        self._network, self._device = network.eval().to(device), device
        self.width = self._tried()

    def embed(self, crops: NDArray[np.uint8], flip: bool = False) -> NDArray[np.float32]:
        """Embed `(N, 112, 112, 3)` uint8 RGB crops as `(N, width)` float32, not normalised; all at once.

        `flip` adds the embedding of the mirrored crop.
        """
        check_crops(crops, INPUT_SIZE, self.weights.name)
        planes = torch.from_numpy(network_input(crops, self.mean, self.std, self.colour_order)).to(
            self._device
        )
        with torch.inference_mode():
            embeddings = self._run(planes)
            if flip:
                embeddings = embeddings + self._run(planes.flip(3))
        return embeddings.float().cpu().numpy()

    def _run(self, planes: Tensor) -> Tensor:
        found = self._network(planes)
        return cast("Tensor", found[0] if isinstance(found, tuple | list) else found)

    def _tried(self) -> int:
        """The width of the embeddings of two crops."""
        try:
            found = self.embed(np.zeros((2, INPUT_SIZE, INPUT_SIZE, 3), np.uint8))
        except Exception as error:  # whatever the code of a file raises
            raise WeightsError(
                f"{self.weights} does not run on RGB crops (N, 3, {INPUT_SIZE}, {INPUT_SIZE}): "
                f"{' '.join(str(error).split())[-300:]}."
            ) from error
        if found.ndim != 2 or len(found) != 2:
            raise WeightsError(
                f"{self.weights} makes {tuple(found.shape)} of two crops: expected (2, width), an embedding "
                "of each."
            )
        return found.shape[1]


def open_recognisers(texts: Sequence[str], device: str = "cpu") -> dict[str, Embedder]:
    """Open recognisers, by their names.

    A text is `PATH[,name=NAME][,colour=RGB|BGR][,pixels=RANGE][,torchscript=yes]`; without a name it is that
    of the file or folder. Raises ConfigError for two recognisers of one name and unknown options; further as
    `open_recogniser`.
    """
    found: dict[str, Embedder] = {}
    for text in texts:
        path, options = parse(text, ("name", "colour", "pixels", "torchscript"))
        name = options.get("name") or (path.name if path.is_dir() else path.stem)
        colour, pixels = options.get("colour", "RGB").upper(), options.get("pixels")
        if colour not in get_args(ColourOrder) or pixels not in (None, *PIXELS):
            raise ConfigError(f"{text!r}: colour is RGB or BGR, and pixels one of {', '.join(PIXELS)}")
        if options.get("torchscript", "yes") != "yes":
            raise ConfigError(
                f"{text!r}: torchscript=yes lets the code in a TorchScript file run; or leave it out"
            )
        if name in found:
            raise ConfigError(f"two recognisers are called {name}: name one of them, PATH,name=NAME")
        runs_code = "torchscript" in options
        found[name] = open_recogniser(path, cast("ColourOrder", colour), pixels, device, runs_code)
    if not found:
        raise ConfigError(
            "no recogniser is given: name a pack's folder, an .onnx file, or weights of an iResNet"
        )
    return found


def open_recogniser(
    path: Path,
    colour_order: ColourOrder = "RGB",
    pixels: str | None = None,
    device: str = "cpu",
    torchscript: bool = False,
) -> Embedder:
    """Open a recogniser.

    Args:
        path: an insightface pack (a folder), the folder of a training, an `.onnx` file, or weights of an
            iResNet in `.pt`, `.pth`, `.ckpt` or `.safetensors`: a state dict of insightface's or
            ElasticFace's, or a training checkpoint.
        colour_order: what it was trained on; AdaFace's networks want BGR, nearly all others RGB.
        pixels: a row of PIXELS. None: as an ONNX file or its graph says, -1..1 in torch.
        device: cpu or cuda.
        torchscript: the file is TorchScript, a network of any kind. It holds code, which runs: only say so of
            a file that you trust.

    Raises WeightsError for a file that is no recogniser, ConfigError for a device that is not there.
    """
    if (path / TRAINED).is_file():
        path = path / TRAINED
    if torchscript:
        embedder: Any = TorchEmbedder(path, _load_torchscript(path, _device(device)), device, colour_order)
    elif path.suffix in SUFFIXES:
        embedder = TorchEmbedder(path, load_network(path), _device(device), colour_order)
    else:
        embedder = load_embedder(path, device=device, colour_order=colour_order)
    if pixels is not None:
        embedder.mean, embedder.std = PIXELS[pixels]
    return embedder


def _device(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no GPU here; use cpu")
    return device


def _load_torchscript(path: Path, device: str) -> nn.Module:
    """Load a network with its code. Raises WeightsError."""
    try:
        with warnings.catch_warnings():
            # torch.export is to take its place; published networks have not followed
            warnings.simplefilter("ignore", DeprecationWarning)
            network: nn.Module = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{path} cannot be read as TorchScript ({' '.join(str(error).split())[:300]}): expected what "
            "torch.jit.save wrote."
        ) from error
    return network


def _is_torchscript(path: Path) -> bool:
    """Whether a file is TorchScript, by what torch tells it by."""
    try:
        with zipfile.ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{path} cannot be read as weights ({type(error).__name__}): expected a state dict by torch.save or "
        "safetensors, of tensors alone. Fetch it again and compare its sha256."
    )


def load_network(path: Path) -> nn.Module:
    """Build the network whose weights a file holds. Raises WeightsError; runs nothing from the file."""
    if _is_torchscript(path):
        raise WeightsError(
            f"{path} is TorchScript, whose code would run: where it is a recogniser to verify and you trust "
            f"where it comes from, give {path},torchscript=yes."
        )
    try:
        content = read_tensors(path, "cpu")
    except FileNotFoundError as error:
        raise WeightsError(f"There is no {path}: check the path of the recogniser.") from error
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):  # which torch has written since 2020
            raise _unreadable(path, error) from error
        raise WeightsError(
            f"{path} cannot be read as weights, as it holds more than tensors, numbers and text, and loading "
            "that could run code: if you trust it, save its weights alone, "
            f"torch.save(torch.load('{path}', weights_only=False)['state_dict'], 'weights.pt')."
        ) from error
    except Exception as error:
        raise _unreadable(path, error) from error
    weights = _weights(content, path)
    if isinstance(content.get("architecture"), dict):
        network: nn.Module = build_backbone(content["architecture"])
    else:
        network = build_backbone(_architecture(weights, path))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise WeightsError(
            f"{path} holds weights of another network than an iResNet ({reason[:400]}): {_OTHERWISE}"
        ) from error
    return network


def _weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a file, without the prefixes that wrappers put before its keys."""
    found = content
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(
            f"{path} is no state dict: expected names and tensors, or these under {', '.join(_NESTED)}."
        )
    return {_WRAPPERS.sub("", key): value for key, value in found.items()}


def _architecture(weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Read from the names and shapes of its weights which iResNet it is."""
    stages = [f"layer{number}" for number in range(1, 5)]
    layers = [
        sum(bool(re.fullmatch(rf"{stage}\.\d+\.conv1\.weight", key)) for key in weights) for stage in stages
    ]
    if "fc.weight" not in weights or "conv1.weight" not in weights or not all(layers):
        raise WeightsError(
            f"{path} holds weights of another network than an iResNet (names such as "
            f"{', '.join(list(weights)[:3]) or 'none'}): {_OTHERWISE}"
        )
    channels = [weights[f"{stage}.0.conv2.weight"].shape[0] for stage in stages]
    return {"family": "iresnet", "layers": layers, "channels": channels, "width": len(weights["fc.weight"])}
