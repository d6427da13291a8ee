"""Approval of a long build: asked for on the terminal, or by a pause in Prefect with the plan shown."""

import sys

import typer
from prefect import pause_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from pydantic import Field

from flows.artifacts import key_of
from flows.plan import plan_lines, print_plan
from flows.planning import Plan, can_be_timed, plan_of, timed_plan_of
from flows.progress import clock_text
from negfacediff_core.config import BuildConfig, ExecutionConfig
from negfacediff_core.errors import BuildError, ConfigError

# How long a paused flow waits for an answer, and how often it looks for one.
PATIENCE, LOOK = 7 * 24 * 3600, 10


class Approval(RunInput):
    """What is asked in Prefect when a build has paused."""

    approved: bool = Field(default=False, description="Make this dataset.")


def approve_in_terminal(build: BuildConfig, store: str, execution: ExecutionConfig) -> None:
    """Ask on the terminal before a build that would take longer than `execution` allows unasked.

    Raises ConfigError if the answer is no, or nobody is there to answer.
    """
    plan = _too_long(build, store, execution)
    if plan is None:
        return
    print_plan(plan)
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{_described(plan, execution)}, and nobody is there to ask: give --yes to build it unasked, or "
            "raise --approve-above-hours"
        )
    if not typer.confirm("Build it?"):
        raise ConfigError(f"{build.name} was not approved; nothing was made")


def approve_in_prefect(build: BuildConfig, store: str, execution: ExecutionConfig) -> None:
    """Pause the flow run until somebody approves, in Prefect, a build that would take too long unasked.

    The plan stands beside the question and is an artifact of the flow run. Raises BuildError if the answer is
    no or does not come, ConfigError where no Prefect server runs that could show the question.
    """
    plan = _too_long(build, store, execution)
    if plan is None:
        return
    described = _described(plan, execution)
    if PREFECT_API_URL.value() is None:
        raise ConfigError(
            f"{described}, and there is no Prefect server to ask in: set approve_above_hours to 0, or "
            "PREFECT_API_URL to a server."
        )
    text = f"{described}.\n\n" + "\n".join(f"- **{label}** {said}" for label, said in plan_lines(plan))
    create_markdown_artifact(text, key_of("plan", plan.name), f"Plan of {plan.name}")
    # the form of the question shows no description of a field
    asked = f"{text}\n\nTo make it, switch *Approved* on and submit. Submitted without, the run ends."
    question = Approval.with_initial_data(description=asked, approved=False)
    try:
        # a retry of the flow run asks anew, and would else find the answer to the question before
        key = f"approval-{flow_run.run_count}"
        answer = pause_flow_run(question, timeout=PATIENCE, poll_interval=LOOK, key=key)
    except FlowPauseTimeout as error:
        raise BuildError(f"{described}, and nobody approved it in a week; run it again.") from error
    if not answer.approved:
        raise BuildError(f"{build.name} was not approved; nothing was made.")


def _too_long(build: BuildConfig, store: str, execution: ExecutionConfig) -> Plan | None:
    """Return the plan of a build that would take too long unasked, or for a time that is not known."""
    if not can_be_timed(execution):
        return plan_of(build, store, execution)
    plan = timed_plan_of(build, store, execution)
    return plan if plan.hours > execution.approve_above_hours else None


def _described(plan: Plan, execution: ExecutionConfig) -> str:
    allowed = f"the {execution.approve_above_hours:g} h that need no approval"
    if plan.calibration is None or plan.time is None:
        return (
            f"How long {plan.name} would take on workers of {execution.executor} is not known (the setting "
            f"calibration can name such a device), and so not whether it is within {allowed}"
        )
    most = "at least" if plan.calibration.floor else "about"
    return f"{plan.name} would take {most} {clock_text(plan.time.wall.seconds)}, more than {allowed}"
