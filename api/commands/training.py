"""`flowpp train`, and how a job is followed to its end."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from api.client import Client, Job
from api.client.transport import LOCAL
from api.commands.datasets import send
from api.commands.options import (
    AsJson,
    CancelAfter,
    Detach,
    Key,
    Metadata,
    Preset,
    TestAsValidation,
    Url,
    pairs,
    suggested_datasets,
    suggested_models,
)
from api.commands.output import errors, leave_unless_succeeded, print_json, service_at, waiting_for
from api.watch import watch


def train(
    dataset: Annotated[
        str, typer.Argument(autocompletion=suggested_datasets, help="A dataset's id, or a folder or file to upload.")
    ],
    preset: Preset = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the preset's.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Say, model.filters=48. Repeat.")
    ] = None,
    resume_from: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            autocompletion=suggested_models,
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
    """Train a model on a dataset; prints the job's id, and follows it to its end.

    Ctrl-C stops watching; the job goes on.
    """
    changes: dict[str, dict[str, Any]] = {"model": {"preset": preset}, "training": {}}
    for text in change or []:
        _apply(text, changes)
    if steps is not None:
        changes["training"]["steps"] = steps
    own = pairs(metadata)
    with service_at(url, key) as client:
        job = client.training_jobs.create(
            dataset=_dataset(client, dataset, test_as_validation),
            model=changes["model"],
            training=changes["training"],
            resume_from=resume_from,
            metadata=own,
            cancel_after=cancel_after,
        )
        if not as_json:
            typer.echo(job.id)
        if not detach:
            job = follow(client, job)
        if as_json:
            print_json(job)
        if not detach:
            leave_unless_succeeded(job)
            if not as_json:
                errors.print(_said(job.result or {}), markup=False, soft_wrap=True)


def follow(client: Client, job: Job, events: bool = False) -> Job:
    """The job at its end. Meanwhile it is drawn on stderr, or its `events` are printed as JSON."""
    with waiting_for(job):
        if not events:
            return watch(client, job.id, errors)
        for event in client.jobs.events(job.id):
            print_json(event)
        return client.jobs.get(job.id)


def _dataset(client: Client, text: str, test_as_validation: bool) -> str:
    if Path(text).exists():
        return send(client, Path(text), test_as_validation).id
    if test_as_validation:
        raise typer.BadParameter("--test-as-validation is for images to upload; a dataset has its parts")
    if not text.startswith("ds_"):
        raise typer.BadParameter(
            f"{text!r} is no file or folder here, and no dataset's id: `flowpp datasets list` lists these, as ds_..."
        )
    return text


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


def _said(result: dict[str, Any]) -> str:
    best, validation = result.get("best_checkpoint"), result.get("validation_bits_per_dim")
    if best is None:
        return "succeeded"
    return f"succeeded; best checkpoint {best}" + ("" if validation is None else f", {validation:.3f} bits/dim")
