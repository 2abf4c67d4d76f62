"""The `flowpp` command: the local service, and its client in plain form."""

import signal
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from api.administration import backup, gc, keys, reindex
from api.client import ClientError, ProblemError, Unreachable
from api.commands import checkpoints, datasets, jobs, presets, webhooks
from api.commands.likelihood import likelihood
from api.commands.output import BAD_INPUT, EXIT_CODES, FAILURE, UNREACHED, fail
from api.commands.sampling import sample
from api.commands.status import status
from api.commands.training import train
from api.stack import Stack, StackError, exit_on_signals

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__, epilog=EXIT_CODES
)
app.command()(status)
app.add_typer(datasets.app, name="datasets")
app.command()(train)
app.command()(likelihood)
app.command()(sample)
app.add_typer(jobs.app, name="jobs")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(presets.app, name="presets")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(keys, name="keys")
app.command()(backup)
app.command()(reindex)
app.command()(gc)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"flowpp {version('flowpp')}")
        raise typer.Exit


@app.callback()
def _flowpp(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Loopback port; 0 takes a free one.")] = 8000,
    data: Annotated[Path, typer.Option(help="Directory of all data; it survives a restart.")] = Path("data"),
) -> None:
    """Run the service on this machine until Ctrl-C: API, Redis server, a training and an inference worker."""
    from worker.settings import from_environment  # here, as other commands start sooner without it

    from_environment(data_directory=data)  # raises before anything is started
    typer.echo("starting ...", err=True)
    with Stack(data, port) as stack, stack.guard():
        typer.echo(f"flowpp serves on {stack.url}, with its documentation on {stack.url}/docs.")
        typer.echo(f"Data and logs are in {stack.data}. Ctrl-C stops everything.")
        try:
            while True:
                signal.pause()
        finally:
            typer.echo("stopping ...", err=True)


def main() -> None:
    """Exit codes are in --help. Errors are a sentence on stderr."""
    exit_on_signals()
    try:
        app(prog_name="flowpp")
    except ProblemError as error:
        ours = error.status >= 500 or error.status == 429
        fail(str(error), FAILURE if ours else BAD_INPUT)
    except Unreachable as error:
        why = f"the service at {error.url} cannot be reached: {error.reason}"
        fail(f"{why}. Is `flowpp serve` running, and is --url right?", UNREACHED)
    except ValueError as error:  # a url or key that is none; others are no command's to raise
        fail(str(error), BAD_INPUT)
    except (ClientError, StackError, OSError) as error:
        fail(str(error), FAILURE)
