"""Flow++: run the service on this machine, and use one here or elsewhere."""

import signal
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from api.administration import backup, gc, keys, reindex
from api.client import ClientError, Unreachable
from api.commands import checkpoints, datasets, jobs, presets, webhooks
from api.commands.likelihood import likelihood
from api.commands.output import BAD_INPUT, EXIT_CODES, FAILURE, UNREACHED, fail, on_interrupt
from api.commands.sampling import sample
from api.commands.status import status
from api.commands.training import train
from api.stack import Stack, StackError, exit_on_signals
from flowpp.environment import settle_streams

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
    port: Annotated[int, typer.Option(min=0, max=65535, help="Loopback port; 0 chooses a free one.")] = 8000,
    data: Annotated[Path, typer.Option(help="Directory of all data, which a restart finds again.")] = Path("data"),
) -> None:
    """Run the service on this machine, until Ctrl-C.

    These are the API, a Redis server, a training worker and an inference worker.
    """
    from worker.settings import from_environment  # here, as other commands start sooner without it

    from_environment(data_directory=data)  # raises before anything is started
    typer.echo("starting ...", err=True)
    stopped = f"stopped; the data stay in {data.absolute()}"
    with on_interrupt(lambda: stopped), Stack(data, port) as stack, stack.guard():
        typer.echo(f"flowpp serves on {stack.url}, with its documentation on {stack.url}/docs.")
        typer.echo(f"Data and logs are in {stack.data}. Ctrl-C stops everything.")
        try:
            while True:
                signal.pause()
        finally:
            typer.echo("stopping ...", err=True)


def main() -> None:
    """Exit codes are in --help. Errors are a sentence on stderr."""
    settle_streams()
    exit_on_signals()
    try:
        app(prog_name="flowpp")
    except Unreachable as error:
        why = f"the service at {error.url} cannot be reached: {error.reason}"
        fail(f"{why}. Is `flowpp serve` running there? --url or FLOWPP_URL names another address.", UNREACHED)
    except ValueError as error:  # a url, a key or an image
        fail(str(error), BAD_INPUT)
    except (ClientError, StackError) as error:
        fail(str(error), FAILURE)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), FAILURE)
