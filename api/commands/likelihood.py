"""`flowpp likelihood`."""

import csv
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from api.client import Client, Job
from api.client.transport import LOCAL
from api.commands.folders import image_files
from api.commands.ids import id_of
from api.commands.options import AsJson, CancelAfter, Detach, Key, Metadata, Model, Url, pairs
from api.commands.output import (
    creating,
    download_artifacts,
    finished,
    leave_unless_succeeded,
    note,
    print_json,
    print_table,
    refuse_filled,
    service_at,
)


def likelihood(
    model: Model,
    images: Annotated[list[Path] | None, typer.Argument(exists=True, help="Image files and folders of them.")] = None,
    dataset: Annotated[
        str | None, typer.Option(callback=id_of("dataset"), help="A dataset's id: its validation images are scored.")
    ] = None,
    importance_samples: Annotated[
        int, typer.Option(min=1, help="Noise samples per image. More give a tighter bound.")
    ] = 1,
    bits_map: Annotated[bool, typer.Option("--bits-map", help="Write a map of the bits in each image.")] = False,
    latents: Annotated[bool, typer.Option("--latents", help="Write the latents of the images.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", file_okay=False, help="Directory for the files of the job."),
    ] = None,
    metadata: Metadata = None,
    cancel_after: CancelAfter = None,
    detach: Detach = False,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Score images in bits/dim. Prints each image and the mean; lower is likelier."""
    if bool(images) == bool(dataset):
        raise typer.BadParameter("give images (files or folders) or --dataset, one of the two")
    files = image_files(images or ())
    if (bits_map or latents) and output is None and not detach:
        raise typer.BadParameter("--bits-map and --latents write files: choose a directory by --output, or --detach")
    own = pairs(metadata)
    if output is not None and not detach:
        refuse_filled(output)
    with service_at(url, key) as client:
        with creating("likelihood"):
            job = client.likelihood_jobs.create(
                model=model,
                dataset=dataset,
                images=[path for _, path in files],
                importance_samples=importance_samples,
                bits_map=bits_map,
                latents=latents,
                metadata=own,
                cancel_after=cancel_after,
            )
        if not detach:
            job = finished(client, job)
            if images and job.result is not None and "images" not in job.result:
                job = job.model_copy(update={"result": job.result | {"images": _rows(client, job)}})
            if images and job.result is not None:  # the service knows files without their folders
                rows = zip(job.result["images"], files, strict=True)
                named = [row | {"name": name} for row, (name, _) in rows]
                job = job.model_copy(update={"result": job.result | {"images": named}})
        if as_json:
            print_json(job)
        elif detach:
            typer.echo(job.id)
        if detach:
            return
        leave_unless_succeeded(job)
        if not as_json:
            _print(job.result or {})
        if output is not None:
            names = [artifact.name for artifact in client.jobs.artifacts(job.id)]
            download_artifacts(client, job.id, names, output)
            note(f"wrote {len(names)} files into {output}")


def _rows(client: Client, job: Job) -> list[dict[str, Any]]:
    """Returns the row of each image, which is in a file if the job has many."""
    with tempfile.TemporaryDirectory() as directory:
        path = client.jobs.download(job.id, "likelihood.csv", Path(directory) / "likelihood.csv")
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {name: value if name == "name" else float(value) if value else None for name, value in row.items()}
                for row in csv.DictReader(file)
            ]


def _print(result: dict[str, Any]) -> None:
    images = result.get("images", [])
    rows = [(image["name"], f"{image['bits_per_dim']:.4f}", f"{image['log_likelihood']:.1f}") for image in images]
    count = result["num_images"]
    error = f" ± {result['standard_error']:.4f}" if result.get("standard_error") is not None else ""
    if count > 1:
        mean = f"{result['bits_per_dim']:.4f}{error}"
        rows.append((f"mean of {count}", mean, f"{result['log_likelihood']:.1f}"))
    print_table(("name", "bits/dim", "log-likelihood (nats)"), rows, headed=True)
