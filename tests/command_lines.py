"""Parse command lines as the programs would, without running them."""

import shlex
from importlib import import_module
from pathlib import Path

import click
import cyclopts
import typer

ROOT = Path(__file__).parents[1]
# Where click's commands of Dask are.
DASK = {name: f"distributed.cli.dask_{name}" for name in ("scheduler", "worker")}


def check(words):
    """Raise an error that says what is wrong if `words` are no command line of a program that is known here.

    Returns whether it is one of those: negfacediff, ./run, dask or prefect.
    """
    program, *arguments = words
    if words[:2] == ["./run", "test"]:
        missing = [word for word in arguments if word.startswith("tests/") and not (ROOT / word).exists()]
        if missing:
            raise click.UsageError(f"there is no {missing[0]}")
    elif program in ("negfacediff", "./run"):
        from flows.cli import app

        _click(typer.main.get_command(app), program, arguments)
    elif program == "dask":
        name, *options = arguments
        _click(import_module(DASK[name]).main, f"dask {name}", options)
    elif program == "prefect":
        _prefect(arguments)
    else:
        return False
    return True


def _click(command, name, arguments):
    """Have click, or typer's likeness of it, take the arguments, down to the last command."""
    context = command.make_context(name, list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def _prefect(arguments):
    from prefect.cli._app import _app

    arguments = [word for word in arguments if word != "--no-prompt"]
    try:
        _app.parse_args(arguments, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise click.UsageError(f"prefect {shlex.join(arguments)}: {error}") from error


def lines_of(script):
    """Yield the commands of a shell script as words: continued lines joined, comments and blanks left out."""
    for line in script.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words
