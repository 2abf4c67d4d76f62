"""`flowpp checkpoints`."""

import shlex
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from api.client import Checkpoint
from api.client.transport import LOCAL
from api.commands.ids import id_of
from api.commands.options import AsJson, CheckpointId, Key, Limit, Published, Url
from api.commands.output import (
    UploadProgress,
    errors,
    on_interrupt,
    print_json,
    print_list,
    print_object,
    service_at,
    when,
)
from api.watch import transfer

app = typer.Typer(no_args_is_help=True, help="Checkpoints: trained models.")


@app.command("list")
def list_(
    job: Annotated[str | None, typer.Option(callback=id_of("job"), help="Only those of this training job.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """List checkpoints.

    Prints id, steps, images seen, validation bits/dim, creation time and training job.
    """
    with service_at(url, key) as client:
        found = islice(client.checkpoints.list(job=job), limit)
        head = ("checkpoint", "step", "images seen", "validation", "created", "job")
        print_list(head, found, as_json, _row)


def _row(checkpoint: Checkpoint) -> tuple[str, ...]:
    validation = checkpoint.metrics.get("validation_bits_per_dim")
    return (
        checkpoint.id,
        str(checkpoint.step),
        str(checkpoint.images_seen),
        "" if validation is None else f"{validation:.3f}",
        when(checkpoint.created_at),
        checkpoint.job or "",
    )


@app.command()
def show(checkpoint: CheckpointId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Print the record of a checkpoint."""
    with service_at(url, key) as client:
        print_object(client.checkpoints.get(checkpoint), as_json)


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The authors' .npz file.")],
    preset: Published,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Import published weights. Prints the checkpoint's id.

    The file is the .npz file of the authors.
    """
    progress = UploadProgress("checkpoint")
    with (
        service_at(url, key) as client,
        on_interrupt(progress.outcome),
        transfer(errors, f"uploading {file.name}") as report,
    ):
        checkpoint = client.checkpoints.upload(file, preset, progress.reporting(report))
    if as_json:
        print_json(checkpoint)
    else:
        typer.echo(checkpoint.id)


@app.command()
def download(
    checkpoint: CheckpointId,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New directory, or file ending in .zip. By default the id."),
    ] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Download a checkpoint. Prints the directory, which flowpp.FlowPP.load reads."""
    target = output or Path(checkpoint)
    if target.exists() and (target.suffix != ".zip" or target.is_dir()):
        raise typer.BadParameter(f"{target} exists; choose another --output")
    again = f"`flowpp checkpoints download {checkpoint} --output {shlex.quote(str(target))}` continues from there."
    stopped = (
        f"Download interrupted: {target} was not written, and the part that has arrived is kept next to it. {again}"
    )
    with (
        service_at(url, key) as client,
        on_interrupt(lambda: stopped),
        transfer(errors, f"downloading {checkpoint}") as report,
    ):
        fetch = client.checkpoints.download if target.suffix == ".zip" else client.checkpoints.fetch
        path = fetch(checkpoint, target, report)
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(path)


@app.command()
def delete(checkpoint: CheckpointId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Delete a checkpoint. Refused while a job uses it."""
    with service_at(url, key) as client:
        client.checkpoints.delete(checkpoint)
    if as_json:
        print_json({"id": checkpoint, "deleted": True})
