"""The table of deployments: what `negfacediff serve` serves, and prefect.yaml lists for a work pool."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from flows.presets import headline, preset_text
from flows.recipes import recipe_text

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

#: The work pool of prefect.yaml, and the variables that set store and executor of its deployments.
POOL, STORE_VARIABLE, EXECUTOR_VARIABLE = "negfacediff", "NEGFACEDIFF_STORE", "NEGFACEDIFF_EXECUTOR"
#: Tag of all deployments, by which the UI can be filtered.
TAG = "negfacediff"
#: Of the schedules: said rather than left to Prefect, whose default is the same.
TIME_ZONE = "UTC"

# The functions of the flows; the flow's name, which begins that of a deployment, is the key.
ENTRYPOINTS = {
    "build-dataset": "flows.build.build_dataset",
    "grow-dataset": "flows.grow.grow_dataset",
    "evaluate": "flows.evaluate.evaluate",
    "compare": "flows.compare.compare",
    "resume-failed": "flows.recovery.resume_failed",
    "verify-store": "flows.verification.verify_store",
    "export-dataset": "flows.export.export_dataset",
    "train-recogniser": "flows.train_recogniser.train_recogniser",
    "verify-recogniser": "flows.verify_recogniser.verify_recogniser",
}
# Flows that read no store; what they write lies beside the datasets.
WITHOUT_STORE = ("verify-recogniser",)
# Where flows that write beside the datasets write, below the store.
OUT = {"compare": "comparison"}
# Flows whose units an executor runs.
WITH_EXECUTOR = ("build-dataset", "grow-dataset", "evaluate", "resume-failed", "export-dataset")


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

    def form(self, store: str, executor: str = "") -> dict[str, Any]:
        """Return the parameters that the form begins with, where datasets are kept in `store`.

        `executor` is where units run, if not in threads of the machine that runs the flow.
        """
        if self.flow in WITHOUT_STORE:
            return {**self.parameters, "out": f"{store}/verification"}
        build = {"build": yaml.safe_load(preset_text(self.preset))} if self.preset else {}
        how = {"execution": {"executor": executor}} if executor and self.flow in WITH_EXECUTOR else {}
        out = {"out": f"{store}/{OUT[self.flow]}"} if self.flow in OUT else {}
        return {"store": store, **build, **self.parameters, **how, **out}


_GOES_ON = (
    "Run it again, with the same parameters, after any interruption: what is committed is never made twice."
)
_BRING = (
    "Bring the weights: the fields *generator*, *detector* and *judge* say where they are looked for; "
    "`negfacediff weights check FOLDER` tells whether a folder will do. Read their licences, then set "
    "*accept licences* in *execution*."
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
        f"Adds identities to a run every night at two, {TIME_ZONE} (the schedule's time zone, on this page, "
        "is yours to set). **The schedule is off:** set the parameters to your run and store, then turn it "
        "on, on this page or with `prefect deployment schedule resume`; off again in the same way (`pause`). "
        "A night is left out while the one before it is still at work.",
        (TAG, "build", "schedule"),
        # the demo's pack has contexts for so many
        parameters=MappingProxyType({"run": "demo", "identities": 100, "until_identities": 300}),
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
    Deployment(
        "export-dataset",
        "export-dataset",
        "Writes the images of a finished run as trainers read them (a folder an identity, RecordIO, "
        "WebDataset, Hugging Face), chosen by status, quality, similarity and number, with their card and "
        "checksums. *out* is yours to give: a new folder on the machine that runs this, best outside the "
        "store, which gets its name when it is complete. The artifact *export* says what was written. "
        f"{_GOES_ON}",
        (TAG, "export"),
        parameters=MappingProxyType({"run": "demo"}),
    ),
    Deployment(
        "train-recogniser",
        "train-recogniser",
        "Trains a recogniser on the aligned crops of a run, or of a folder, and writes it as ONNX. The form "
        "begins with the recipe *small*, for a CPU; `negfacediff train-recogniser --recipe paper` is the "
        "published one. *out* is yours to give: a folder on the machine that runs this, best outside the "
        "store. After a cancellation or a crash, run it again with the same parameters: it goes on "
        "from its last checkpoint.",
        (TAG, "recogniser"),
        parameters=MappingProxyType({"run": "demo", "recipe": yaml.safe_load(recipe_text("small"))}),
    ),
    Deployment(
        "verify-recogniser",
        "verify-recogniser",
        "Verifies recognisers on sets of pairs (LFW and its like, as .bin files or pair lists) and of "
        "templates (IJB-C): ten-fold accuracy, TAR at FAR, EER, and how recognisers differ. The table is an "
        "artifact, and lies with all figures in *out*.",
        (TAG, "figures"),
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
            "schedules": [Cron(deployment.cron, timezone=TIME_ZONE, active=active, slug=deployment.name)],
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
# absolute path, or an fsspec URL; {EXECUTOR_VARIABLE} the executor, such as tcp://scheduler:8786, threads
# where it is not set. The package is installed where workers run; nothing is pulled.
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
        "schedules": [
            {"cron": deployment.cron, "timezone": TIME_ZONE, "slug": deployment.name, "active": False}
        ],
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW"},
    }
    return {
        "name": deployment.name,
        "entrypoint": ENTRYPOINTS[deployment.flow],
        "description": deployment.description,
        "tags": list(deployment.tags),
        "parameters": deployment.form(_variable(STORE_VARIABLE), _variable(EXECUTOR_VARIABLE)),
        **(scheduled if deployment.cron else {}),
        "work_pool": {"name": POOL},
    }


def _variable(name: str) -> str:
    """Return what `prefect deploy` puts an environment variable in the place of."""
    return f"{{{{ ${name} }}}}"


if __name__ == "__main__":
    Path("deployments/prefect.yaml").write_text(prefect_yaml(), encoding="utf-8")
