"""Small builds for the tests of the stages: changed, planned and made without a flow."""

import threading

import pytest

from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.stages import evaluation
from negfacediff_core.stages.build import STAGES, plan_build, run_unit
from negfacediff_core.store.records import pending
from negfacediff_core.store.runs import write_run
from negfacediff_core.store.shards import prepare

EXECUTION = ExecutionConfig(device="cpu")


def changed(build, **changes):
    """A build with other values, given as `section__field=value` or `field=value`."""
    values = build.model_dump()
    for path, value in changes.items():
        *sections, field = path.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[field] = value
    return BuildConfig.model_validate(values)


def planned(build, store):
    """Plan a build and make its directories and run record, as the flow does."""
    specs = plan_build(build, str(store))
    for spec in specs:
        prepare(spec)
    stages = {
        spec.name: {
            "fingerprint": spec.fingerprint,
            "identities": spec.grid.identities,
            "replicates": spec.grid.replicates,
        }
        for spec in specs
    }
    write_run(str(store), build.name, {"stages": stages})
    return {spec.name: spec for spec in specs}


# What the evaluation draws with, which takes most of a tiny build's time.
DRAWING = ("contact_sheet", "score_histogram", "det_curves", "distribution_plots")


def make(build, store, stages=tuple(STAGES), reverse=False, pictures=False):
    """Plan a build and run every unit of the `stages` that is pending; in reverse order where asked.

    The evaluation's pictures are empty files, except for tests that ask for `pictures`.
    """
    specs = planned(build, store)
    with pytest.MonkeyPatch.context() as patch:
        for name in () if pictures else DRAWING:
            patch.setattr(evaluation, name, lambda *arguments: b"")
        for name in stages:
            for unit in sorted(pending(specs[name]), reverse=reverse):
                run_unit(specs[name], unit, EXECUTION)
    return specs


def finish(build, store, execution):
    """Build what is pending with an executor, without Prefect."""
    from flows.build import pending_lines
    from flows.rounds import GROUPS
    from tasks.chunks import Crew, drive
    from tasks.executors import open_pool

    specs = planned(build, store)
    with open_pool(execution) as pool:
        crew = Crew(pool, execution, lambda stage: None, lambda stage, rows: None, threading.Event())
        for group in GROUPS:
            assert drive(pending_lines([specs[stage] for stage in group]), 0, crew) == []
    return specs
