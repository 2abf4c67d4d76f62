"""`flowpp sample`."""

from pathlib import Path
from typing import Annotated

import typer

from api.client.transport import LOCAL
from api.commands.options import AsJson, CancelAfter, Detach, Key, Metadata, Model, Url, pairs
from api.commands.output import (
    creating,
    download_artifacts,
    finished,
    leave_unless_succeeded,
    note,
    print_json,
    refuse_filled,
    service_at,
)


def sample(
    model: Model,
    num_samples: Annotated[
        int | None,
        typer.Option("--num-samples", "-n", min=1, help="By default 16; 9 with --interpolate."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Scale of the latents; 1 is the model.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the latents.")] = None,
    interpolate: Annotated[
        tuple[Path, Path] | None,
        typer.Option(exists=True, dir_okay=False, metavar="A B", help="Interpolate between the image files A and B."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Directory of grid.png, samples.npz and png/.")
    ] = Path("samples"),
    metadata: Metadata = None,
    cancel_after: CancelAfter = None,
    detach: Detach = False,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Draw samples from a model. Writes one picture of all, and each as a file."""
    own = pairs(metadata)
    if interpolate and (temperature != 1 or seed is not None):
        raise typer.BadParameter("--interpolate uses no random latents: it goes with neither --temperature nor --seed")
    if not detach:
        refuse_filled(output)
    with service_at(url, key) as client:
        with creating("sampling"):
            if interpolate:
                job = client.sampling_jobs.interpolate(
                    model=model,
                    images=interpolate,
                    num_samples=num_samples or 9,
                    metadata=own,
                    cancel_after=cancel_after,
                )
            else:
                job = client.sampling_jobs.create(
                    model=model,
                    num_samples=num_samples or 16,
                    temperature=temperature,
                    seed=seed,
                    metadata=own,
                    cancel_after=cancel_after,
                )
        if not detach:
            job = finished(client, job)
        if as_json:
            print_json(job)
        elif detach:
            typer.echo(job.id)
        if detach:
            return
        leave_unless_succeeded(job)
        names = [artifact.name for artifact in client.jobs.artifacts(job.id)]
        download_artifacts(client, job.id, names, output)
    if not as_json and "grid.png" in names:
        typer.echo(output / "grid.png")
    note(f"wrote {len(names)} files into {output}")
