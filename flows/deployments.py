"""The table of deployments: what `negfacediff serve` serves, and prefect.yaml lists for a work pool."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from flows.presets import headline, preset_text

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

#: The work pool of prefect.yaml, and the variable that sets the store of its deployments.
POOL, STORE_VARIABLE = "negfacediff", "NEGFACEDIFF_STORE"
#: Tag of all deployments, by which the UI can be filtered.
TAG = "negfacediff"

# The functions of the flows; the flow's name, which begins that of a deployment, is the key.
ENTRYPOINTS = {
    "build-dataset": "flows.build.build_dataset",
    "grow-dataset": "flows.grow.grow_dataset",
    "evaluate": "flows.evaluate.evaluate",
    "compare": "flows.compare.compare",
    "resume-failed": "flows.recovery.resume_failed",
    "verify-store": "flows.verification.verify_store",
}


class Deployment(NamedTuple):
    """A row of the table: a flow with a name, and what its form begins with.

    A build has the settings of a `preset`. A `cron` line is a schedule, inactive until somebody turns it on;
    its run is left out while the one before it still runs. `description` is Markdown for people at the UI.
    """

    flow: str
    name: str
    description: str
    tags: tuple[str, ...]
    preset: str = ""
    parameters: Mapping[str, Any] = MappingProxyType({})
    cron: str = ""

    @property
    def full_name(self) -> str:
        """Flow and name, as Prefect's commands want it."""
        return f"{self.flow}/{self.name}"

    def form(self, store: str) -> dict[str, Any]:
        """Return the parameters that the form begins with, where datasets are kept in `store`."""
        build = {"build": yaml.safe_load(preset_text(self.preset))} if self.preset else {}
        out = {"out": f"{store}/comparison"} if self.flow == "compare" else {}
        return {"store": store, **build, **self.parameters, **out}


_GOES_ON = (
    "Run it again, with the same parameters, after any interruption: what is committed is never made twice."
)
_BRING = (
    "Bring the weights: the fields *generator*, *detector* and *judge* say where they are looked for; "
    "`negfacediff weights check FOLDER` tells whether a folder will do."
)


def _build(name: str, preset: str, more: str) -> Deployment:
    text = f"{headline(preset_text(preset))}\n\n{more}\n\n{_GOES_ON}"
    return Deployment("build-dataset", name, text, (TAG, "build"), preset)


DEPLOYMENTS = (
    _build("demo", "demo", "All that it needs ships with the project."),
    _build(
        "paper",
        "negfacediff-paper",
        f"{_BRING} For a dataset rather than a reproduction, set *previous alpha of DDIM* to exact.",
    ),
    _build("adaptdiff", "adaptdiff", _BRING),
    _build(
        "frcsyn-500k",
        "frcsyn-500k",
        f"{_BRING} `negfacediff plan frcsyn-500k --device h100` tells what it "
        "takes; set *approve above hours* to be asked first.",
    ),
    Deployment(
        "grow-dataset",
        "grow-dataset",
        "Adds identities, or images of each, to a run of a store. Nothing that is there changes. A run that"
        " is not complete is finished instead: run it again to grow it.",
        (TAG, "build"),
    ),
    Deployment(
        "grow-dataset",
        "nightly",
        "Adds identities to a run every night at two. **The schedule is off:** set the parameters to your "
        "run and store, then turn it on, on this page or with `prefect deployment schedule resume`; off "
        "again in the same way (`pause`). A night is left out while the one before it is still at work.",
        (TAG, "build", "schedule"),
        parameters=MappingProxyType({"run": "demo", "identities": 100}),
        cron="0 2 * * *",
    ),
    Deployment(
        "evaluate",
        "evaluate",
        "Computes the figures of a finished run anew, with other settings or by another judge. Its images "
        "and its own figures stay; the new ones belong to the run `<run>.evaluated`, or to a name that you "
        "give.",
        (TAG, "figures"),
    ),
    Deployment(
        "compare",
        "compare",
        "Sets finished runs of one store side by side: figures and their differences to the first run, score "
        "histograms, DET curves, images.",
        (TAG, "figures"),
    ),
    Deployment(
        "resume-failed",
        "resume-failed",
        "Goes on with a run that failed, was cancelled or has crashed, as its record says, and makes failed "
        "images again. Leave *run* empty where only one comes into question.",
        (TAG, "store"),
    ),
    Deployment(
        "verify-store",
        "verify-store",
        "Reads every file of a store again and compares it with what was committed. The run fails if "
        "something is damaged, and its artifact lists it; with *repair*, resume-failed then makes it again.",
        (TAG, "store"),
    ),
)


def runner_deployment(deployment: Deployment, store: str, active: bool) -> "RunnerDeployment":
    """Return a deployment for `serve`, with `store` in its form; `active` is whether its schedule is on."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    module, _, function = ENTRYPOINTS[deployment.flow].rpartition(".")
    flow = getattr(import_module(module), function)
    scheduled: dict[str, Any] = {}
    if deployment.cron:
        scheduled = {
            "schedules": [Cron(deployment.cron, active=active, slug=deployment.name)],
            "concurrency_limit": ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
        }
    made: RunnerDeployment = flow.to_deployment(
        deployment.name,
        parameters=deployment.form(store),
        description=deployment.description,
        tags=list(deployment.tags),
        entrypoint_type=EntrypointType.MODULE_PATH,
        **scheduled,
    )
    return made


HEAD = f"""\
# The deployments for a work pool, as `negfacediff serve` has them for one machine. Made from the table in
# flows/deployments.py by `python -m flows.deployments`: change that.
#
#   prefect work-pool create {POOL} --type process
#   {STORE_VARIABLE}=/data/faces prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
#   prefect worker start --pool {POOL}
#
# {STORE_VARIABLE} is the store that the forms begin with: a folder that every worker sees under the same
# absolute path, or an fsspec URL. The package is installed where workers run; nothing is pulled.
#
# Runs into one store wait for each other, one concurrency limit a store; two stores run side by side.
# The schedule of grow-dataset/nightly is off. To turn it on or off: in the UI, on the deployment's page, or
#   prefect deployment schedule ls grow-dataset/nightly
#   prefect deployment schedule resume grow-dataset/nightly ID     (pause: off)
# `prefect deploy` sets it back to what stands here.
"""


def prefect_yaml() -> str:
    """Return the text of deployments/prefect.yaml."""
    content = {
        "name": "negfacediff",
        "pull": [],
        "deployments": [_for_pool(deployment) for deployment in DEPLOYMENTS],
    }
    return f"{HEAD}{yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True)}"


def _for_pool(deployment: Deployment) -> dict[str, Any]:
    scheduled = {
        "schedules": [{"cron": deployment.cron, "slug": deployment.name, "active": False}],
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW"},
    }
    return {
        "name": deployment.name,
        "entrypoint": ENTRYPOINTS[deployment.flow],
        "description": deployment.description,
        "tags": list(deployment.tags),
        "parameters": deployment.form(f"{{{{ ${STORE_VARIABLE} }}}}"),
        **(scheduled if deployment.cron else {}),
        "work_pool": {"name": POOL},
    }


if __name__ == "__main__":
    Path("deployments/prefect.yaml").write_text(prefect_yaml(), encoding="utf-8")
