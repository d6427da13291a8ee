"""`negfacediff export`: its options, and what it prints."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from flows.command import DEFAULTS, Verbose, print_places, show_log, with_execution
from flows.export_result import result_lines
from flows.resume import Store
from flows.words import count_text, size_text
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.export.challenges import Challenge
from negfacediff_core.export.manifest import MANIFEST
from negfacediff_core.export.settings import (
    Encoding,
    ExportConfig,
    ExportFormat,
    ExportImages,
    ImageStatus,
    RecordVariant,
    check_places,
    check_refill,
)

# Files with something wrong that are named; the rest are counted.
_NAMED = 50
_HELP = {name: field.description for name, field in ExportConfig.model_fields.items()}


@with_execution("approve_above_hours")
def export(
    store: Store,
    run: Annotated[str, typer.Argument(help="Name of the run; one that a leakage gate kept is one, too.")],
    out: Annotated[str, typer.Option(help="Folder to make; it must not be there yet.")],
    format_: Annotated[
        ExportFormat, typer.Option("--format", help=_HELP["format"])
    ] = ExportFormat.imagefolder,
    images: Annotated[ExportImages, typer.Option(help=_HELP["images"])] = ExportImages.aligned,
    encoding: Annotated[Encoding, typer.Option(help=_HELP["encoding"])] = Encoding.png,
    quality: Annotated[int, typer.Option(help=_HELP["quality"])] = 95,
    variant: Annotated[RecordVariant, typer.Option(help=_HELP["variant"])] = RecordVariant.header,
    status: Annotated[list[ImageStatus] | None, typer.Option(help=_HELP["status"])] = None,
    min_quality: Annotated[float | None, typer.Option(help=_HELP["min_quality"])] = None,
    min_cosine: Annotated[float, typer.Option(help=_HELP["min_cosine"])] = -1.0,
    max_cosine: Annotated[float, typer.Option(help=_HELP["max_cosine"])] = 1.0,
    min_images: Annotated[int, typer.Option(help=_HELP["min_images"])] = 1,
    images_per_identity: Annotated[int, typer.Option(help=_HELP["images_per_identity"])] = 0,
    identities: Annotated[int, typer.Option(help=_HELP["identities"])] = 0,
    challenge: Annotated[Challenge, typer.Option(help=_HELP["challenge"])] = Challenge.none,
    filter_: Annotated[str, typer.Option("--filter", metavar="FILE", help=_HELP["filter"])] = "",
    refill: Annotated[
        bool, typer.Option("--refill", help="Grow the run until there are as many identities as asked for.")
    ] = False,
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Write the images of a finished run in a format that trainers read, with its card and checksums.

    Running the same command again goes on where it stopped. The folder gets its name when it is complete.
    """
    from negfacediff_core.stages.exported import check_columns, check_exportable, gated_from
    from negfacediff_core.store.runs import stages_of_run
    from negfacediff_core.store.status import check_store

    settings = _settings(
        format=format_,
        images=images,
        encoding=encoding,
        quality=quality,
        variant=variant,
        status=tuple(status or (ImageStatus.ok,)),
        min_quality=min_quality,
        min_cosine=min_cosine,
        max_cosine=max_cosine,
        min_images=min_images,
        images_per_identity=images_per_identity,
        identities=identities,
        challenge=challenge,
        filter=filter_,
    )
    check_store(store)
    stages = stages_of_run(store, run)
    if refill:
        check_refill(settings, run, gated_from(store, run))
        check_columns(stages, settings, run)
    else:
        check_exportable(stages, settings, run)
    check_places(out, settings)
    show_log(verbose)
    from flows.export import export_dataset
    from flows.launch import launch

    result = launch(
        export_dataset,
        run=run,
        out=out,
        settings=settings,
        refill=refill,
        execution=execution,
        store=store,
    )
    for line in result_lines(result):
        print(line)
    print_places(images=result["out"], card=f"{result['out']}/README.md", sums=f"{result['out']}/{MANIFEST}")


def verify_export(
    folder: Annotated[Path, typer.Argument(help="Folder of an export, also one that was copied or fetched.")],
) -> None:
    """Read every file of an export, and compare it with the SHA-256 in its manifest.json.

    The exit code is 0 where all is as it was exported; otherwise 1, and each file that is not is named.
    """
    from flows.progress import CallbackBar
    from negfacediff_core.export.manifest import check_manifest, read_head

    with CallbackBar("check", "MB") as bar:
        problems = list(check_manifest(folder, bar))
    for problem in problems[:_NAMED]:
        print(problem)
    if len(problems) > _NAMED:
        print(f"And {len(problems) - _NAMED:,} more.")
    if problems:
        raise typer.Exit(1)
    total = read_head(folder)["total"]
    print(f"{count_text(total['files'], 'file')}, {size_text(total['bytes'])}: all as they were exported.")


def _settings(**values: Any) -> ExportConfig:
    from flows.presets import explain

    try:
        return ExportConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, ExportConfig)) from error
