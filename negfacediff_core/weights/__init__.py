"""What a file or folder of weights is, whether it fits together, and whether it runs.

Licences of weights cannot be told from their numbers: what lies beside them is read, else the terms are named
that weights of their kind usually carry (WEIGHTS.md).
"""

from pathlib import Path

from negfacediff_core.diffusion.release_config import CONFIG_FILE
from negfacediff_core.errors import WeightsError
from negfacediff_core.weights.generators import inspect_generator, inspect_state_dict
from negfacediff_core.weights.inspection import USUAL_LICENCES, Inspection, licence_of
from negfacediff_core.weights.networks import inspect_networks

__all__ = ["USUAL_LICENCES", "Inspection", "inspect_weights", "licence_of"]


def inspect_weights(source: str | Path) -> Inspection:
    """Inspect a generator's folder, a model pack, or one file of weights, and run once what can be run.

    Raises `WeightsError` where there are no weights, and any `NegFaceDiffError` for a configuration that
    describes none; what is wrong with weights that are there stands in the inspection.
    """
    try:
        return _inspect(Path(source))
    except OSError as error:
        raise WeightsError(
            f"{error.filename or source} cannot be read: {error.strerror or error}."
        ) from error


def _inspect(source: Path) -> Inspection:
    if source.is_file():
        return inspect_networks(source) if source.suffix == ".onnx" else inspect_state_dict(source)
    if (source / CONFIG_FILE).exists() or (source / "checkpoints").is_dir():
        return inspect_generator(source)
    if any(source.glob("*.onnx")):
        return inspect_networks(source)
    raise _nothing_at(source)


def _nothing_at(source: Path) -> WeightsError:
    if not source.exists():
        return WeightsError(f"There is nothing at {source}: check the path.")
    inside = {path.parent for path in source.glob("*/*.onnx")}
    inside |= {path.parents[1] for path in source.glob(f"*/{CONFIG_FILE}")}
    hint = f" Did you mean {', '.join(str(folder) for folder in sorted(inside))}?" if inside else ""
    return WeightsError(
        f"{source} holds no weights: a generator's folder holds {CONFIG_FILE}, a model pack holds "
        f"*.onnx files.{hint}"
    )
