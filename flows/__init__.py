"""Prefect flows and the `negfacediff` command: the only place that prints."""

import os

# Prefect reads these when it is first imported. What a user has set stays.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    # people look at progress bars; Prefect's own log goes to its server, and to the console with --verbose
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}.items():
    os.environ.setdefault(_name, _value)
