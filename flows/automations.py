"""`negfacediff automations`: what a Prefect server does by itself when a run crashes, fails or waits."""

from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from flows.words import command_text
from negfacediff_core.errors import ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore


def automations(
    names: Annotated[list[str] | None, typer.Argument(help="Automations to set up; none: list them.")] = None,
    block: Annotated[
        str | None,
        typer.Option(metavar="TYPE/NAME", help="Notification block that notify uses: slack-webhook/team."),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take them away instead.")] = False,
) -> None:
    """List the automations that ship, or set some up in the Prefect server at PREFECT_API_URL.

    Setting one up twice is the same as once: what is there is brought to what ships, and stays paused if
    somebody has paused it.
    """
    texts = automation_texts()
    wrong = [name for name in names or () if name not in texts]
    if wrong:
        raise ConfigError(f"There is no automation {wrong[0]!r}: there are {', '.join(texts)}.")
    if not names:
        print_automations()
    for name in names or ():
        done = take_away(name) if remove else set_up(name, block)
        print(f"{name}: {done}.")


def automation_texts() -> dict[str, str]:
    """Return the automations that ship: name -> YAML text, in the order in which one wants them."""
    folder = files("deployments") / "automations"
    names = ("mark-crashed", "resume-crashed", "notify")
    return {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in names}


def print_automations() -> None:
    """List the automations, what each does, and whether the server has it."""
    table = Table("automation", "on the server", "what it does", box=None, pad_edge=False)
    with _client() as client:
        for name, text in automation_texts().items():
            described = yaml.safe_load(text)
            there = client.read_automations_by_name(described["name"])
            state = ("on" if there[0].enabled else "paused") if there else "not set up"
            table.add_row(f"[bold]{name}", state, described["description"])
    Console().print(table)


def set_up(name: str, block: str | None = None) -> str:
    """Set up an automation that ships, or bring the one there to what ships; returns what was done.

    Raises ConfigError if there is no server, or it lacks the deployment or the `block` (`type/name`) that
    the automation needs.
    """
    with _client() as client:
        automation = _automation(name, block, client)
        there = client.read_automations_by_name(automation.name)
        if not there:
            client.create_automation(automation)
            return "set up"
        client.update_automation(there[0].id, automation.model_copy(update={"enabled": there[0].enabled}))
        return "set up already" + ("" if there[0].enabled else ", and paused")


def take_away(name: str) -> str:
    """Remove an automation that ships from the server; returns what was done."""
    with _client() as client:
        there = client.read_automations_by_name(yaml.safe_load(automation_texts()[name])["name"])
        for one in there:
            client.delete_automation(one.id)
    return "removed" if there else "not there"


def _automation(name: str, block: str | None, client: "SyncPrefectClient") -> "AutomationCore":
    """Read an automation; what its actions name is looked up, for a server knows that by its id alone."""
    from prefect.events.schemas.automations import AutomationCore
    from prefect.exceptions import ObjectNotFound

    values: dict[str, Any] = yaml.safe_load(automation_texts()[name])
    for action in values["actions"]:
        try:
            if "deployment" in action:
                what = f"The deployment {action['deployment']} is not"
                action["deployment_id"] = client.read_deployment_by_name(action.pop("deployment")).id
            if "block" in action:
                kind, slash, title = (block or "").partition("/")
                if not slash:
                    example = command_text("automations", name, "--block", "slack-webhook/team")
                    raise ConfigError(
                        f"The automation {name} needs a notification block: make one in Prefect, under "
                        f"Blocks, and name it, as in `{example}`."
                    )
                what = f"The block {block} is not"
                del action["block"]
                action["block_document_id"] = client.read_block_document_by_name(title, kind).id
        except ObjectNotFound as error:
            raise ConfigError(
                f"{what} on the Prefect server, and the automation {name} needs it: make it there first "
                "(`negfacediff serve` makes the deployments)."
            ) from error
    return AutomationCore.model_validate(values)


def _client() -> "SyncPrefectClient":
    """Return a client of the Prefect server; ConfigError where none is known, or it does not answer."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    from flows.launch import check_server

    address = PREFECT_API_URL.value()
    if address is None:
        raise ConfigError(
            "Automations live in a Prefect server, and PREFECT_API_URL names none: start one with "
            "`negfacediff serve`, and set PREFECT_API_URL to its address, as http://127.0.0.1:4200/api."
        )
    check_server(address)
    return get_client(sync_client=True)
