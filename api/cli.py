"""The `flowpp` command: the local service, and its client in plain form."""

import json
import signal
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console

from api.administration import gc, keys, reindex
from api.client import Client, Job, ProblemError
from api.stack import Stack, StackError, exit_on_signals
from api.watch import uploading, watch

FAILURE, BAD_INPUT = 1, 2

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)
datasets = typer.Typer(no_args_is_help=True, help="Image sets of the service.")
jobs = typer.Typer(no_args_is_help=True, help="Jobs of every kind.")
checkpoints = typer.Typer(no_args_is_help=True, help="Checkpoints that training jobs have written.")
app.add_typer(datasets, name="datasets")
app.add_typer(jobs, name="jobs")
app.add_typer(checkpoints, name="checkpoints")
app.add_typer(keys, name="keys")
app.command()(reindex)
app.command()(gc)

progress_console = Console(stderr=True)

LOCAL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option("--url", envvar="FLOWPP_URL", help="Where the service is.")]
Limit = Annotated[int, typer.Option(min=1, help="List so many, newest first.")]
JobId = Annotated[str, typer.Argument(metavar="JOB")]
Model = Annotated[str, typer.Argument(help="A checkpoint's id, or a training job's: its best checkpoint.")]


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Loopback port; 0 takes a free one.")] = 8000,
    data: Annotated[Path, typer.Option(help="Directory of all data; it survives a restart.")] = Path("data"),
) -> None:
    """Run the service on this machine until Ctrl-C: API, Redis server, a training and an inference worker."""
    typer.echo("starting ...", err=True)
    with Stack(data, port) as stack, stack.guard():
        typer.echo(f"flowpp serves on {stack.url}, with its documentation on {stack.url}/docs.")
        typer.echo(f"Data and logs are in {stack.data}. Ctrl-C stops everything.")
        try:
            while True:
                signal.pause()
        finally:
            typer.echo("stopping ...", err=True)


@datasets.command("upload")
def upload_dataset(
    source: Annotated[Path, typer.Argument(exists=True, readable=True, help="Folder, archive, .npy or .npz.")],
    url: Url = LOCAL,
) -> None:
    """Upload images."""
    with Client(url) as client, uploading(progress_console, source.name) as progress:
        dataset = client.datasets.upload(source, progress)
    typer.echo(dataset.model_dump_json(indent=2))


@datasets.command("list")
def list_datasets(limit: Limit = 20, url: Url = LOCAL) -> None:
    """List image sets: id, images, of them for validation, channels x height x width."""
    with Client(url) as client:
        _table(
            (d.id, str(d.num_images), str(d.num_validation), "x".join(map(str, d.shape)), _when(d.created_at))
            for d in islice(client.datasets.list(), limit)
        )


@app.command()
def train(
    dataset: Annotated[str, typer.Argument(help="A dataset's id, or a folder or file to upload.")],
    preset: Annotated[str, typer.Option(help="One of GET /v1/presets.")] = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the preset's.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Say, model.filters=48.")
    ] = None,
    resume_from: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Warm start: begin with the weights of this checkpoint or job.")
    ] = None,
    watch_it: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the job to its end.")] = True,
    url: Url = LOCAL,
) -> None:
    """Train a model on a dataset. Ctrl-C stops watching; the job goes on."""
    changes: dict[str, dict[str, Any]] = {"model": {"preset": preset}, "training": {}}
    for text in change or []:
        _apply(text, changes)
    if steps is not None:
        changes["training"]["steps"] = steps
    with Client(url) as client:
        if Path(dataset).exists():
            with uploading(progress_console, dataset) as progress:
                dataset = client.datasets.upload(Path(dataset), progress).id
        job = client.training_jobs.create(dataset=dataset, resume_from=resume_from, **changes)
        typer.echo(job.id)
        if watch_it:
            _finish(watch(client, job.id, progress_console))


@app.command()
def likelihood(
    model: Model,
    images: Annotated[list[Path] | None, typer.Argument(exists=True, dir_okay=False, help="Image files.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Instead of files: a dataset's validation images.")] = None,
    importance_samples: Annotated[int, typer.Option(min=1, help="Noise samples an image; more: tighter bound.")] = 1,
    url: Url = LOCAL,
) -> None:
    """Bits/dim of images under a model."""
    if bool(images) == bool(dataset):
        raise typer.BadParameter("give image files or --dataset, one of the two")
    with Client(url) as client:
        job = client.likelihood_jobs.create(
            model=model, dataset=dataset, images=images or (), importance_samples=importance_samples
        )
        _finish(client.jobs.wait(job.id))


@app.command()
def sample(
    model: Model,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1)] = 16,
    temperature: Annotated[float, typer.Option(min=0)] = 1,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The grid of samples.")] = Path("samples.png"),
    url: Url = LOCAL,
) -> None:
    """Draw images from a model, into one PNG."""
    with Client(url) as client:
        job = client.sampling_jobs.create(model=model, num_samples=num_samples, temperature=temperature, seed=seed)
        _finish(client.jobs.wait(job.id))
        client.jobs.download(job.id, "grid.png", output)
    typer.echo(f"wrote {output}", err=True)


@jobs.command("list")
def list_jobs(
    limit: Limit = 20,
    kind: Annotated[str | None, typer.Option("--type")] = None,
    status: Annotated[str | None, typer.Option()] = None,
    url: Url = LOCAL,
) -> None:
    """List jobs: id, type, status, when created."""
    with Client(url) as client:
        found = islice(client.jobs.list(type=kind, status=status), limit)
        _table((job.id, job.type, job.status, _when(job.created_at)) for job in found)


@jobs.command("show")
def show_job(job: JobId, url: Url = LOCAL) -> None:
    """Print a job's record."""
    with Client(url) as client:
        typer.echo(client.jobs.get(job).model_dump_json(indent=2))


@jobs.command("watch")
def watch_job(job: JobId, url: Url = LOCAL) -> None:
    """Follow a job to its end. Ctrl-C stops watching; the job goes on."""
    with Client(url) as client:
        _finish(watch(client, job, progress_console))


@jobs.command("cancel")
def cancel_job(job: JobId, url: Url = LOCAL) -> None:
    """Cancel a job; a training job keeps its last checkpoint."""
    with Client(url) as client:
        typer.echo(client.jobs.cancel(job).status)


@jobs.command("pause")
def pause_job(job: JobId, url: Url = LOCAL) -> None:
    """Pause a training job: it writes a checkpoint and frees its worker."""
    with Client(url) as client:
        typer.echo(client.jobs.pause(job).status)


@jobs.command("resume")
def resume_job(job: JobId, url: Url = LOCAL) -> None:
    """Let a paused job go on from its last checkpoint."""
    with Client(url) as client:
        typer.echo(client.jobs.resume(job).status)


@jobs.command("delete")
def delete_job(job: JobId, url: Url = LOCAL) -> None:
    """Delete a job with its checkpoints and artifacts; one that runs is cancelled first."""
    with Client(url) as client:
        client.jobs.delete(job)


@checkpoints.command("list")
def list_checkpoints(limit: Limit = 20, url: Url = LOCAL) -> None:
    """List checkpoints: id, steps, images seen, when written."""
    with Client(url) as client:
        _table(
            (c.id, str(c.step), str(c.images_seen), _when(c.created_at))
            for c in islice(client.checkpoints.list(), limit)
        )


@checkpoints.command("upload")
def upload_checkpoint(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The authors' .npz file.")],
    preset: Annotated[str, typer.Option(help="The model it is of: cifar10, imagenet32 or imagenet64.")],
    url: Url = LOCAL,
) -> None:
    """Import the weights that the authors published; prints the checkpoint's id."""
    with Client(url) as client, uploading(progress_console, file.name) as progress:
        typer.echo(client.checkpoints.upload(file, preset, progress).id)


@checkpoints.command("download")
def download_checkpoint(
    checkpoint: Annotated[str, typer.Argument()],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="By default CHECKPOINT.zip.")] = None,
    url: Url = LOCAL,
) -> None:
    """Download a checkpoint as one file."""
    with Client(url) as client:
        typer.echo(client.checkpoints.download(checkpoint, output or Path(f"{checkpoint}.zip")))


def main() -> None:
    """Exit codes: 0 done, 1 failure, 2 bad input, 128 + n ended by signal n. Errors are a sentence on stderr."""
    exit_on_signals()
    try:
        app()
    except ProblemError as error:
        _fail(str(error), BAD_INPUT if error.status < 500 else FAILURE)
    except httpx.TransportError as error:
        _fail(f"the service cannot be reached: {error}. Is `flowpp serve` running, and is --url right?", FAILURE)
    except (StackError, OSError) as error:
        _fail(str(error), FAILURE)


def _fail(message: str, status: int) -> NoReturn:
    print(f"flowpp: {message}", file=sys.stderr)
    raise SystemExit(status)


def _finish(job: Job) -> None:
    """Prints the result of a finished job; leaves with status 1 if it did not succeed."""
    if job.error is not None:
        _fail(f"job {job.id} {job.status}: {job.error.message} ({job.error.code})", FAILURE)
    if job.status != "succeeded":
        _fail(f"job {job.id} is {job.status}", FAILURE)
    typer.echo(json.dumps(job.result, indent=2))


def _apply(text: str, changes: dict[str, dict[str, Any]]) -> None:
    """Puts `model.dequantizer.blocks=1` where it belongs; a value is JSON, or else a string."""
    path, equals, value = text.partition("=")
    first, *rest = path.split(".")
    if not equals or first not in changes or not rest:
        raise typer.BadParameter(f"--set {text}: write model.NAME=VALUE or training.NAME=VALUE")
    target = changes[first]
    for name in rest[:-1]:
        target = target.setdefault(name, {})
    try:
        target[rest[-1]] = json.loads(value)
    except ValueError:
        target[rest[-1]] = value


def _table(rows: Iterable[tuple[str, ...]]) -> None:
    found = list(rows)
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    for row in found:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
