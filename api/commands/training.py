"""`flowpp train`, and following a job to its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from api.client import Client, ClientError, Job
from api.client.transport import LOCAL
from api.commands.datasets import send
from api.commands.ids import check_id, kind_of
from api.commands.options import (
    AsJson,
    CancelAfter,
    Detach,
    Key,
    Metadata,
    Preset,
    TestAsValidation,
    Url,
    is_model,
    pairs,
    suggested_datasets,
    suggested_models,
)
from api.commands.output import creating, errors, leave_unless_succeeded, note, print_json, service_at, waiting_for
from api.watch import watch
from flowpp.overrides import parse_overrides


def train(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", autocompletion=suggested_datasets, help="A dataset's id, or a folder or file to upload."
        ),
    ],
    preset: Preset = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the preset's.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field, as model.filters=48. Repeat for several."),
    ] = None,
    resume_from: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            autocompletion=suggested_models,
            callback=is_model,
            help="Warm start: begin with the weights of this checkpoint or job.",
        ),
    ] = None,
    test_as_validation: TestAsValidation = False,
    metadata: Metadata = None,
    cancel_after: CancelAfter = None,
    detach: Detach = False,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Train a model. Prints the job's id, and follows the job to its end.

    A folder or file is checked before it is uploaded, and images that the service has already are not stored twice.
    Ctrl-C stops watching, and the job continues. `flowpp presets NAME` prints every field that --set can change.
    """
    from api.commands import checks  # loads NumPy and Pillow, which most commands do not need

    model, recipe = _changes(change or [], steps)
    request: dict[str, Any] = {
        "dataset": dataset,
        "model": {"preset": preset, **model},
        "training": recipe,
        "resume_from": resume_from,
        "metadata": pairs(metadata),
    }
    source = Path(dataset) if Path(dataset).exists() else None
    if source is None:
        _check_dataset(dataset, test_as_validation)
    checked = checks.checked({**request, "dataset": "ds_"})
    with service_at(url, key) as client:
        if source is not None:
            checks.check_before_upload(client, source, checked)
            request["dataset"] = send(client, source, test_as_validation).id
        with _naming(request["dataset"] if source else None):
            job = client.training_jobs.create(**request, cancel_after=cancel_after)
        if not as_json:
            typer.echo(job.id)
        if not detach:
            job = follow(client, job)
        if as_json:
            print_json(job)
        if not detach:
            leave_unless_succeeded(job)
            if not as_json:
                note(_said(job.result or {}))


def follow(client: Client, job: Job, events: bool = False) -> Job:
    """Returns the job at its end. Until then draws it on stderr, or prints its `events` as JSON."""
    with waiting_for(job):
        if not events:
            return watch(client, job.id, errors)
        for event in client.jobs.events(job.id):
            print_json(event)
        return client.jobs.get(job.id)


def _check_dataset(text: str, test_as_validation: bool) -> None:
    """Raises `typer.BadParameter` for a text that is no dataset's id, and no file or folder either."""
    if test_as_validation:
        raise typer.BadParameter("--test-as-validation is for images to upload; a dataset has its parts")
    if kind_of(text) is None:
        raise typer.BadParameter(
            f"{text!r} is no file or folder here, and no dataset's id: `flowpp datasets list` lists these, as ds_..."
        )
    check_id(text, "dataset")


def _changes(texts: list[str], steps: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what --set and --steps change of the preset's model and recipe. Raises `typer.BadParameter`."""
    try:
        model, recipe = parse_overrides(texts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return model, recipe if steps is None else recipe | {"steps": steps}


@contextmanager
def _naming(dataset: str | None) -> Iterator[None]:
    """Prints which dataset was uploaded if the job is not created, so that nobody uploads the images again."""
    again = "" if dataset is None else f" The images are stored as {dataset}: `flowpp train {dataset}` uses them."
    try:
        with creating("training", again):
            yield
    except ClientError:
        if again:
            note(again.strip())
        raise


def _said(result: dict[str, Any]) -> str:
    best, validation = result.get("best_checkpoint"), result.get("validation_bits_per_dim")
    if best is None:
        return "succeeded"
    return f"succeeded; best checkpoint {best}" + ("" if validation is None else f", {validation:.3f} bits/dim")
