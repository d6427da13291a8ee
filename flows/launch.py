"""Runs a flow from the command line: quietly, with an orderly end when it is interrupted."""

import atexit
import os
import shlex
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import httpx
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL

from negfacediff_core.errors import ConfigError
from tasks.machine import shielded_from_interrupts

INTERRUPTED = 130
#: What is said on Ctrl-C, before the command, of flows that keep what is finished.
GOES_ON = "Finished units are kept; the same command goes on from here:"


def launch(flow: Callable[..., Any], *, after_interrupt: str = GOES_ON, **parameters: Any) -> Any:
    """Return `flow(**parameters)`; on Ctrl-C say how to go on and leave the process with exit code 130.

    `after_interrupt` says, before the command, what running it again does. The flow runs against the Prefect
    server at PREFECT_API_URL, and without one against an embedded server. Raises ConfigError if the server
    does not answer.
    """
    address = PREFECT_API_URL.value()
    try:
        if address is None:
            _start_embedded_server()
        else:
            check_server(address)
        return flow(**parameters)
    except KeyboardInterrupt:
        # The rest is quick, and a second Ctrl-C must not cut it short.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        command = shlex.join([os.environ.get("NEGFACEDIFF_COMMAND", "negfacediff"), *sys.argv[1:]])
        print(f"\nInterrupted. {after_interrupt}\n  {command}", file=sys.stderr)
        stop_embedded_server()
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads in mid-unit cannot be stopped and would hold this up; they have committed nothing.
        os._exit(INTERRUPTED)


def _start_embedded_server() -> None:
    """Start the server as Prefect would by itself, but so that it outlives the flow.

    Neither Ctrl-C nor SIGTERM, which job managers send to all processes, ends it: a flow without its server
    tries for minutes to tell it of its own end. This process ends it, also on SIGTERM.
    """
    print("Starting Prefect (about ten seconds)...", file=sys.stderr)
    signal.signal(signal.SIGTERM, _end)

    def start() -> None:
        with shielded_from_interrupts(signal.SIGTERM):
            SubprocessASGIServer().start()

    # In a thread of its own, so that this one hears Ctrl-C while it waits.
    ThreadPoolExecutor(1).submit(start).result()
    # before that which Prefect has registered, and which knows SIGTERM alone
    atexit.register(stop_embedded_server)


def _end(number: int, frame: FrameType | None) -> None:
    """What SIGTERM does here; during a flow Prefect does it after it has noted the flow's end."""
    stop_embedded_server()
    os._exit(128 + number)


def stop_embedded_server() -> None:
    """End the server, where one was started, by Prefect or here."""
    server = SubprocessASGIServer()  # the very same: there is one object a port, and one without
    if server.server_process:
        server.server_process.kill()
    server.stop()


def check_server(address: str) -> None:
    """Raise ConfigError, which shows no password, unless a Prefect server answers at `address`."""
    try:
        httpx.get(f"{address}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        secret = urlsplit(address).netloc.rpartition("@")[0]
        shown = f"PREFECT_API_URL is {address}, but no Prefect server answers there ({error})"
        raise ConfigError(
            f"{shown.replace(secret, '***') if secret else shown}: start one with `prefect server start`, or "
            "unset PREFECT_API_URL to run without."
        ) from error
