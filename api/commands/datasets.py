"""`flowpp datasets`."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from api.client import Client, Dataset
from api.client.transport import LOCAL
from api.commands.options import AsJson, DatasetId, Key, Limit, TestAsValidation, Url
from api.commands.output import (
    UploadProgress,
    errors,
    note,
    on_interrupt,
    print_json,
    print_list,
    print_object,
    service_at,
    when,
)
from api.watch import transfer
from flowpp.durable import replace_file

app = typer.Typer(no_args_is_help=True, help="Image sets of the service.")


@app.command()
def upload(
    source: Annotated[Path, typer.Argument(exists=True, readable=True, help="Folder, archive, .npy or .npz.")],
    test_as_validation: TestAsValidation = False,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Upload images. Prints the dataset's id."""
    from api.commands.checks import survey  # loads NumPy and Pillow, which most commands do not need

    survey(source, 1)
    with service_at(url, key) as client:
        dataset = send(client, source, test_as_validation)
    if as_json:
        print_json(dataset)
    else:
        typer.echo(dataset.id)


def send(client: Client, source: Path, test_as_validation: bool = False) -> Dataset:
    """Uploads images, and prints a summary: the new dataset, or the one that has the same images."""
    newest = next(client.datasets.list(), None)
    progress = UploadProgress("dataset")
    with on_interrupt(progress.outcome), transfer(errors, f"uploading {source.name}") as report:
        dataset = client.datasets.upload(source, progress.reporting(report), test_as_validation=test_as_validation)
    shape = "x".join(map(str, dataset.shape))
    test = f" and {dataset.num_test} for test, which no training uses" if dataset.num_test else ""
    images = f"{dataset.num_images} images of {shape}, of them {dataset.num_validation} for validation{test}"
    if newest is not None and dataset.created_at <= newest.created_at:
        note(f"reuses {dataset.id}, which has the same {images}")
    else:
        note(f"uploaded {images}, as {dataset.id}")
    return dataset


@app.command("list")
def list_(limit: Limit = 20, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """List image sets.

    Prints id, images, validation images, test images, channels x height x width, upload time and name.
    """
    with service_at(url, key) as client:
        print_list(
            ("dataset", "images", "validation", "test", "shape", "created", "name"),
            islice(client.datasets.list(), limit),
            as_json,
            lambda d: (
                d.id,
                str(d.num_images),
                str(d.num_validation),
                str(d.num_test),
                "x".join(map(str, d.shape)),
                when(d.created_at),
                d.name or "",
            ),
        )


@app.command()
def show(dataset: DatasetId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Print the record of an image set."""
    with service_at(url, key) as client:
        print_object(client.datasets.get(dataset), as_json)


@app.command("contact-sheet")
def contact_sheet(
    dataset: DatasetId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write.", show_default="DATASET.png")
    ] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Write a picture of up to 64 images. Prints the file's name."""
    with service_at(url, key) as client:
        picture = client.datasets.contact_sheet(dataset)
    path = output or Path(f"{dataset}.png")
    replace_file(path, picture)
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(path)


@app.command()
def delete(dataset: DatasetId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Delete an image set. Refused while a job uses it."""
    with service_at(url, key) as client:
        client.datasets.delete(dataset)
    if as_json:
        print_json({"id": dataset, "deleted": True})
