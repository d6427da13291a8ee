"""The automations that ship: Prefect takes them, setting up twice is once, and what is missing is said."""

import subprocess
import sys
from importlib import import_module
from pkgutil import iter_modules

import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer.testing import CliRunner

import flows
from flows.automations import automation_texts, set_up, take_away
from flows.cli import app
from flows.recovery import resume_failed
from negfacediff_core.errors import ConfigError

BLOCK = "custom-webhook/nobody"


@pytest.fixture
def deployment(prefect_server):
    """The deployment that resume-crashed runs."""
    made = resume_failed.to_deployment("resume-failed").apply()
    yield
    for name in automation_texts():
        take_away(name)
    with get_client(sync_client=True) as client:
        client.delete_deployment(made)


def there(name: str) -> list:
    with get_client(sync_client=True) as client:
        return client.read_automations_by_name(yaml.safe_load(automation_texts()[name])["name"])


@pytest.mark.parametrize("name", ["mark-crashed", "resume-crashed"])
def test_setting_up_twice_is_once_and_removing_is_for_good(name, deployment):
    assert set_up(name) == "set up"
    (first,) = there(name)
    assert set_up(name) == "set up already"
    (second,) = there(name)
    assert (second.id, second.trigger, second.actions) == (first.id, first.trigger, first.actions)
    assert take_away(name) == "removed" and there(name) == []
    assert take_away(name) == "not there"


def test_what_somebody_has_paused_stays_paused_and_what_was_changed_is_brought_back(deployment):
    set_up("mark-crashed")
    (made,) = there("mark-crashed")
    with get_client(sync_client=True) as client:
        fields = made.model_dump(include=AutomationCore.model_fields.keys() - {"owner_resource"})
        changed = AutomationCore.model_validate({**fields, "enabled": False, "description": "mine"})
        client.update_automation(made.id, changed)
    assert set_up("mark-crashed") == "set up already, and paused"
    (kept,) = there("mark-crashed")
    assert not kept.enabled and kept.description == made.description


def test_the_list_says_what_the_server_has(deployment):
    assert CliRunner().invoke(app, ["automations", "mark-crashed"]).output == "mark-crashed: set up.\n"
    said = CliRunner().invoke(app, ["automations"]).output.splitlines()
    assert any(line.split()[:2] == ["mark-crashed", "on"] for line in said)
    assert any(line.startswith("notify") and "not set up" in line for line in said)


def test_notify_needs_a_block_that_is_there(prefect_server):
    with pytest.raises(ConfigError, match=r"needs a notification block.*--block slack-webhook/team"):
        set_up("notify")
    with pytest.raises(ConfigError, match=f"The block {BLOCK} is not on the Prefect server"):
        set_up("notify", BLOCK)


def test_resume_crashed_needs_its_deployment(prefect_server):
    with pytest.raises(ConfigError, match=r"resume-failed/resume-failed is not on the Prefect server.*serve"):
        set_up("resume-crashed")


@pytest.mark.parametrize("name", ["mark-crashed", "notify"])
def test_no_flow_is_left_out(name):
    modules = [import_module(f"flows.{module.name}") for module in iter_modules(flows.__path__)]
    there = {one.name for module in modules for one in vars(module).values() if isinstance(one, Flow)}
    assert {"build-dataset", "export-dataset"} <= there
    related = yaml.safe_load(automation_texts()[name])["trigger"]["match_related"]
    assert set(related["prefect.resource.name"]) == there


def test_without_a_server_or_with_a_wrong_name_it_says_so():
    nowhere = temporary_settings({PREFECT_API_URL: None})
    with nowhere, pytest.raises(ConfigError, match="PREFECT_API_URL names none"):
        set_up("mark-crashed")
    refused = CliRunner().invoke(app, ["automations", "mark-crash"])
    assert "There is no automation 'mark-crash': there are mark-crashed" in str(refused.exception)


def test_a_run_gives_signs_of_life_more_often_than_it_is_given_up_however_it_is_loaded():
    code = (
        "import prefect, flows; from prefect.settings import get_current_settings as current; "
        "print(current().flows.heartbeat_frequency)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    within = yaml.safe_load(automation_texts()["mark-crashed"])["trigger"]["within"]
    assert 3 * int(said) <= within
