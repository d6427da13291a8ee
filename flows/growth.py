"""Which build makes a run larger, or evaluates it anew: the one in its record, with a few fields changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows.presets import check_build
from flows.resume import build_of, check_same
from flows.words import command_text, count_text
from negfacediff_core.config import BuildConfig
from negfacediff_core.errors import ConfigError, StoreError
from negfacediff_core.stages.build import plan_build
from negfacediff_core.store.layout import StageSpec
from negfacediff_core.store.runs import read_run
from negfacediff_core.store.status import check_store, unfinished

# The stages that another evaluation leaves as they are; growth leaves the embeddings, too.
IMAGES = ("contexts", "negatives", "samples", "aligned")


def grown(store: str, run: str, identities: int, images: int, until: int = 0) -> tuple[BuildConfig, str]:
    """Return the build that adds identities and images of each to a run, and a sentence that says so.

    A run that is not complete stays as large as its record says: it is to be finished first. `until` bounds
    the identities, 0 not at all. Raises StoreError and ConfigError as `grow_dataset`.
    """
    check_store(store)
    build = build_of(store, run)
    if not identities and not images:
        raise ConfigError(f"{run} is to grow by nothing: give identities or images to add, above 0.")
    _check_kept(build, store, run, (*IMAGES, "embeddings"))
    lacking = unfinished(store).get(run)
    if lacking is not None:
        return build, f"{run} lacks {count_text(lacking, 'unit')} and is finished first; then grow it again."
    wanted = build.identities + identities
    if until:
        wanted = max(build.identities, min(wanted, until))
    larger = {"identities": wanted, "images": build.images + images}
    if larger == {"identities": build.identities, "images": build.images}:
        return build, f"{run} has {build.identities:,} identities already, and stays as it is."
    changed = check_build({**build.model_dump(), **larger}, f"the run {run}, grown")
    return changed, (
        f"{run} grows from {build.identities:,} identities x {build.images:,} images to "
        f"{changed.identities:,} x {changed.images:,}."
    )


def evaluated(
    store: str, run: str, evaluation: Mapping[str, Any], judge: str = "", name: str = ""
) -> BuildConfig:
    """Return the build that evaluates the images of a run anew, as a run `name` (empty: `<run>.evaluated`).

    Fields that `evaluation` leaves out, and an empty `judge`, are the run's own. Raises StoreError and
    ConfigError as `evaluate`.
    """
    check_store(store)
    build = build_of(store, run)
    lacking = unfinished(store).get(run)
    if lacking is not None:
        raise StoreError(
            f"The run {run} is not finished, it lacks {count_text(lacking, 'unit')}: "
            f"{command_text('resume', store, run)}"
        )
    values = build.model_dump()
    changed = check_build(
        {
            **values,
            "name": name or f"{run}.evaluated",
            "evaluation": {**values["evaluation"], **evaluation},
            "embeddings": {**values["embeddings"], **({"judge": judge} if judge else {})},
        },
        f"the evaluation of {run}",
    )
    specs = _check_kept(changed, store, run, IMAGES)
    _check_free(store, changed.name, specs)
    return changed


def _check_kept(build: BuildConfig, store: str, run: str, stages: Sequence[str]) -> Mapping[str, StageSpec]:
    """Return the stages of a build; StoreError if some, named in `stages`, would not be those of the run."""
    specs = {spec.name: spec for spec in plan_build(build, store)}
    check_same([specs[stage] for stage in stages], store, run, "build")
    return specs


def _check_free(store: str, name: str, specs: Mapping[str, StageSpec]) -> None:
    """Raise ConfigError if the name belongs to a run of other images, which it would no longer stand for."""
    there: dict[str, Any] = (read_run(store, name) or {}).get("stages", {})
    if there and there.get("samples", {}).get("fingerprint") != specs["samples"].fingerprint:
        raise ConfigError(f"There is a run {name} of other images in {store}: give another name.")
