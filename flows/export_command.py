"""`negfacediff export`: its options, and what it prints."""

from typing import Annotated, Any

import typer
from pydantic import ValidationError

from flows.command import DEFAULTS, Verbose, print_places, show_log, with_execution
from flows.resume import Store
from flows.words import count_text, size_text
from negfacediff_core.config import ExecutionConfig
from negfacediff_core.errors import ConfigError
from negfacediff_core.export.challenges import Challenge
from negfacediff_core.export.settings import (
    Encoding,
    ExportConfig,
    ExportFormat,
    ExportImages,
    ImageStatus,
    RecordVariant,
)

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
        bool, typer.Option("--refill", help="Grow the run until there are as many as are asked for.")
    ] = False,
    execution: ExecutionConfig = DEFAULTS,
    verbose: Verbose = False,
) -> None:
    """Write the images of a finished run in a format that trainers read, with its card and checksums.

    Running the same command again goes on where it stopped. The folder gets its name when it is complete.
    """
    from negfacediff_core.stages.exported import check_exportable
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
    if "://" in out:
        raise ConfigError(f"--out {out!r} is no local folder: export to one, and copy it from there.")
    check_store(store)
    check_exportable(stages_of_run(store, run), settings, run)
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
    _print_result(result, settings)


def _settings(**values: Any) -> ExportConfig:
    from flows.presets import explain

    try:
        return ExportConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, ExportConfig)) from error


def _print_result(result: dict[str, Any], settings: ExportConfig) -> None:
    print(
        f"{count_text(result['images'], 'image')} of {result['identities']:,} identities, "
        f"{size_text(result['bytes'])}."
    )
    if result["short"]:
        print(
            f"Left out: {result['short']:,} identities with fewer than "
            f"{count_text(result['needed'], 'usable image')}, which lack {result['missing']:,} together."
        )
    print(f"Licence: {result['licence']}. {' '.join(result['conditions'])}".rstrip())
    out = result["out"]
    print_places(images=out, card=f"{out}/README.md", sums=f"{out}/manifest.json")
