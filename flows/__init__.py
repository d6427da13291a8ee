"""Prefect flows and the `negfacediff` command: the only place that prints."""

import os
import sys

# Prefect reads these when it is first imported. What a user has set stays.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    # people look at progress bars; Prefect's own log goes to its server, and to the console with --verbose
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}.items():
    os.environ.setdefault(_name, _value)
# Seconds between a run's signs of life. The automation mark-crashed gives a run up after 90 without any, so
# that this is set whatever a runner of Prefect, whose default is 180, tells its runs.
os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = "30"

if "prefect" in sys.modules:  # a worker of Prefect, which loads a flow
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
