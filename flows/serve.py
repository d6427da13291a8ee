"""`negfacediff serve`: a Prefect server and all deployments on this machine, until Ctrl-C."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from flows.command import Verbose, show_log
from negfacediff_core.errors import BuildError, ConfigError

if TYPE_CHECKING:
    from prefect.runner import Runner

HOST = "127.0.0.1"
# Seconds: between two looks for submitted runs; between a run's signs of life, without which it counts as
# crashed; for a server to come up; for runs, and then for the server, to end.
POLL, HEARTBEAT, STARTUP, ENDING = 2.0, 30, 300.0, 60.0
# Settings of a server that is started here. A lease in memory alone would never end if the server did; and
# version 2 of the pages asks an analytics service for its settings, whatever analytics are set to.
SERVER = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}


def serve(
    store: Annotated[
        str,
        typer.Option(help="Folder or fsspec URL that forms begin with; any other can be typed there."),
    ] = "store",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server and its pages.")] = 4200,
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the pages, where there is a desktop.")
    ] = True,
    verbose: Verbose = False,
) -> None:
    """Start Prefect's server and serve the deployments: builds by form, on a schedule, with progress.

    Everything stays on this machine. Prefect's database lies in ~/.prefect, or in PREFECT_HOME, and survives;
    where PREFECT_API_URL is set, the server there is used. Ctrl-C cancels what runs and ends the server;
    committed units stay.
    """
    show_log(verbose)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _server(port, console) as api:
        from prefect.runner import Runner
        from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

        from flows.deployments import DEPLOYMENTS
        from negfacediff_core.store.location import locate

        with temporary_settings({PREFECT_API_URL: api}):
            runner = Runner(
                "negfacediff", query_seconds=POLL, heartbeat_seconds=HEARTBEAT, pause_on_shutdown=False
            )
            address = locate(store).url
            with _shown("Registering the deployments...", console):
                register(runner, address)
            pages = api.removesuffix("/api")
            console.print(f"\n[bold]{pages}/deployments[/bold]  Ctrl-C ends all.\n")
            for label, text in {
                "deployments": ", ".join(one.full_name for one in DEPLOYMENTS),
                "store": f"{address} (the forms begin with it)",
                "database": str(PREFECT_HOME.value()),
            }.items():
                console.print(f"{label:<12}{text}")
            if browser and has_desktop():
                webbrowser.open(f"{pages}/deployments")
            _run(runner, console)


def register(runner: "Runner", store: str) -> None:
    """Register every deployment with the server and the runner.

    What somebody has set of a scheduled one, its parameters and whether it is on, stays.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.deployments import DEPLOYMENTS, runner_deployment

    with get_client(sync_client=True) as client:
        for row in DEPLOYMENTS:
            made = runner_deployment(row, store, active=False)
            if row.cron:
                try:
                    there = client.read_deployment_by_name(row.full_name)
                except ObjectNotFound:
                    pass
                else:
                    active = any(schedule.active for schedule in there.schedules)
                    made = runner_deployment(row, store, active)
                    made.parameters = there.parameters
            runner.add_deployment(made)


@contextmanager
def _shown(text: str, console: Console) -> Iterator[None]:
    """Show what is being done: as long as it takes on a terminal, elsewhere as a line."""
    if not console.is_terminal:
        console.print(text)
    with console.status(text):
        yield


def has_desktop() -> bool:
    """Tell whether a browser could show a page here."""
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(shown) or sys.platform in ("darwin", "win32")


@contextmanager
def _server(port: int, console: Console) -> Iterator[str]:
    """Yield the address of the API of a Prefect server: the one that is set, or one of our own."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    from flows.launch import check_server

    address = PREFECT_API_URL.value()
    if address is not None:
        check_server(address)
        yield address
        return
    _check_port(port)
    log = Path(PREFECT_HOME.value()) / "negfacediff-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    api = f"http://{HOST}:{port}/api"
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)],
            # the pages ask for the API at this address
            env={**os.environ, **SERVER, "PREFECT_UI_API_URL": api},
            stdout=written,
            stderr=written,
            stdin=subprocess.DEVNULL,
            # Ctrl-C in the terminal is not meant for it before all runs have ended
            start_new_session=True,
        )
    try:
        with _shown("Starting Prefect's server (about ten seconds)...", console):
            _await_health(process, api, log)
        yield api
    finally:
        _end(process)


def _check_port(port: int) -> None:
    """Raise ConfigError if a port is taken, and say by what."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            api = f"http://{HOST}:{port}/api"
            use = f"set PREFECT_API_URL to {api} to use it, or " if _is_healthy(api) else ""
            by = "A Prefect server" if use else "Another program"
            raise ConfigError(f"{by} listens on port {port} already: {use}give another --port") from error


def _is_healthy(api: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{api}/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


def _await_health(process: "subprocess.Popen[bytes]", api: str, log: Path) -> None:
    """Wait until the server answers; BuildError with the end of its log if it does not."""
    until = time.monotonic() + STARTUP
    while not _is_healthy(api):
        if process.poll() is not None or time.monotonic() > until:
            said = " ".join(log.read_text(errors="replace").split())[-300:]
            raise BuildError(f"Prefect's server did not start; its log, {log}, ends: {said}")
        time.sleep(0.2)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run(runner: "Runner", console: Console) -> None:
    """Run what is submitted until SIGINT or SIGTERM; then cancel what is at work."""
    from tasks.machine import shielded_from_interrupts

    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    loop = asyncio.new_event_loop()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            loop.run_until_complete(runner.start())
        except BaseException as error:
            failed.append(error)

    # The terminal sends Ctrl-C to the processes of runs as well, which are to be cancelled in order.
    with shielded_from_interrupts():
        thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
        thread.start()
    while thread.is_alive() and not told.wait(0.2):
        pass
    if failed:
        raise BuildError(f"Prefect's runner has stopped: {failed[0]}") from failed[0]
    console.print("\nEnding: runs at work are cancelled; what they have committed stays.")
    stopped: Any = asyncio.run_coroutine_threadsafe(runner.astop(), loop)
    try:
        stopped.result(ENDING)
    except TimeoutError:
        console.print("A run did not end in time and is left to the server's next start.")
    thread.join(ENDING)
