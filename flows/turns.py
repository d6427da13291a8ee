"""One run at a time writes into a store: others wait for their turn, and Prefect shows that they do.

The turn is a global concurrency limit of one, named after the store, so that builds into two stores run side
by side. It is held by a lease that is renewed while the run lives: LEASE seconds after a crash the server
gives the turn to the next. Units are guarded by the store's own leases besides; a lost turn loses no unit.
"""

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, FlowRun
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Running

from negfacediff_core.store.location import locate

# Seconds for which a run keeps its turn without renewing it: the shortest that Prefect has.
LEASE = 60
# Seconds between two tries of a run that waits.
LOOK = 5.0


def turn_name(store: str) -> str:
    """Return the name of a store's concurrency limit: the end of its address, and a hash of the whole."""
    url = locate(store).url
    readable = re.sub("[^a-z0-9]+", "-", url.lower())[-40:].strip("-")
    return f"store-{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


@contextmanager
def turn(store: str) -> Iterator[None]:
    """Hold the turn of a store while the block runs; wait for it first, in a state that says so.

    Without a flow run, or a server that lasts beyond it (PREFECT_API_URL), there is nobody to wait for.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or PREFECT_API_URL.value() is None:
        yield
        return
    with ExitStack() as held:
        _take(held, store, context.flow_run)
        yield


def _take(held: ExitStack, store: str, run: FlowRun) -> None:
    """Enter the turn of a store into `held`, as soon as it is free."""
    name = turn_name(store)
    holder = ConcurrencyLeaseHolder(type="flow_run", id=run.id)
    waits = False
    while not (_is_free(name) and _is_taken_by(held, name, holder)):
        if not waits:
            _show(
                run,
                "Waiting for its turn",
                f"Another run writes to {store}. This one goes on by itself as soon as that one has ended, "
                f"or {LEASE + 15} s after it has crashed (concurrency limit {name}).",
            )
        waits = True
        time.sleep(LOOK)
    if waits:
        _show(run, "Running", f"{store} is free.")


def _is_free(name: str) -> bool:
    """Tell whether a limit has a place. Makes it where it is not there; what somebody has set stays."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
            return True
    return not limit.active or limit.active_slots < limit.limit


def _is_taken_by(held: ExitStack, name: str, holder: ConcurrencyLeaseHolder) -> bool:
    """Take a place of a limit; tells whether no other run was quicker."""
    try:
        held.enter_context(concurrency(name, max_retries=0, lease_duration=LEASE, holder=holder))
    except ConcurrencySlotAcquisitionError as error:
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == httpx.codes.LOCKED:
            return False
        raise
    return True


def _show(run: FlowRun, name: str, message: str) -> None:
    """Log what the run does, and show it as its state."""
    get_run_logger().info(message)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Running(name=name, message=message), force=True)
