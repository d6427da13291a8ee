"""`negfacediff weights`: what weights are, before anything is made with them."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from negfacediff_core.config import ExecutionConfig, Precision
from negfacediff_core.errors import ConfigError, WeightsError
from negfacediff_core.export.licence import terms_of

if TYPE_CHECKING:
    from negfacediff_core.weights import Inspection

LICENCE_UNKNOWN = "no licence lies beside these weights; usual ones of their kind, which a dataset inherits"
WIDE = 140  # columns where no terminal sets them: a hash fits on its line
# Images that number formats are compared by, and the steps of DDIM that make them.
STRAYED, STEPS = 8, 20

app = typer.Typer(
    name="weights",
    no_args_is_help=True,
    help="Look at weights before you use them: what they are, whose licence they carry, whether they work.",
)


@app.command(
    epilog="Examples:\n\nnegfacediff weights check packs/demo/generator\n\n"
    "negfacediff weights check ~/.insightface/models/buffalo_l\n\n"
    "negfacediff weights check weights/idiff-face --precision bf16 --device cuda\n\n"
    "negfacediff weights check first_stage.ckpt"
)
def check(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A generator's folder, a model pack, or one file (.onnx, .ckpt, .pt, .safetensors)."
        ),
    ],
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Sample a few images with a generator in this number format, too, and tell how far they are "
            "from float32; may be repeated."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where they are sampled: cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Show architecture, parameters, hashes and licence of weights, and run them once on the CPU.

    The exit code is 0 if a generator can sample, or the networks of a model pack run. Otherwise it is 2 and
    the last paragraph says what is wrong and what to do. No code that a file may hold is ever run.
    """
    from negfacediff_core.stages.models import resolve_weights
    from negfacediff_core.weights import USUAL_LICENCES, inspect_weights
    from tasks.executors import check_available

    if precision:
        check_available(ExecutionConfig(device=device), *precision)
    folder = resolve_weights(str(folder))
    inspection = inspect_weights(folder)
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(f"[bold]{inspection.kind}[/bold]: {folder}")
    for table in _tables(inspection, folder, USUAL_LICENCES):
        console.print()
        console.print(table)
    console.print()
    if inspection.problem:
        raise WeightsError(inspection.problem)
    if precision:
        console.print(_strayed(folder, [Precision(one) for one in precision], device))
        console.print()
    console.print("[bold green]These weights work.")


def _strayed(folder: Path, precisions: Sequence[Precision], device: str) -> Table:
    """How far images in number formats are from those in float32, of STRAYED random identities."""
    import numpy as np

    from negfacediff_core.diffusion.checkpoint import load_generator
    from negfacediff_core.diffusion.engine import SamplerSettings
    from negfacediff_core.diffusion.precision_error import precision_error

    generator = load_generator(folder, device)
    if not generator.context_width:
        raise ConfigError(f"{folder} takes no identity contexts: --precision compares images of identities.")
    contexts = np.random.default_rng(0).standard_normal((STRAYED, generator.context_width), np.float32)
    contexts /= np.linalg.norm(contexts, axis=1, keepdims=True)
    table = _table("number format", "predictions differ by", "images differ by", "at most")
    for one in precisions:
        error = precision_error(generator, SamplerSettings(steps=STEPS), one, contexts, -contexts)
        table.add_row(one, f"{error.eps:.1e}", f"{error.mean:.2f} of 255", f"{error.most}")
    return table


def _tables(inspection: "Inspection", folder: Path, usual: Sequence[str]) -> Iterator[Table]:
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in inspection.facts.items():
        facts.add_row(f"[bold]{name}", fact)
    yield facts
    parts = _table("network", "parameters", "stored as", "keys")
    for part in inspection.parts:
        parts.add_row(part.name, f"{part.parameters:,}", part.stored, part.verdict)
    yield parts
    files = _table("file", "for", "bytes", "sha256")
    for file in inspection.files:
        inside = file.path.relative_to(folder) if file.path != folder else file.path.name
        files.add_row(str(inside), file.role, f"{file.size:,}", file.sha256)
    yield files
    licences = _table("licence" if inspection.licence else LICENCE_UNKNOWN)
    for licence in (inspection.licence,) if inspection.licence else usual:
        licences.add_row(licence)
    yield licences
    terms = _table("terms of a dataset made with it (a build asks to accept what is more than credit)")
    terms.add_row(terms_of([inspection.licence or ""]).text)
    yield terms
    if inspection.trials:
        trials = _table("run once", "seconds", "outcome")
        for trial in inspection.trials:
            trials.add_row(trial.name, f"{trial.seconds:.2f}", trial.outcome)
        yield trials


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        number = column in ("parameters", "bytes", "seconds")
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table
