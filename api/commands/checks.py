"""Checks of a training before its images are uploaded, since an upload may take hours."""

from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from api.client import Client
from api.commands.output import BAD_INPUT, fail
from api.commands.refusals import option_of
from flowpp.archives import members
from flowpp.config import ModelConfig, Shape
from flowpp.data import BadImages, Limits, read_member
from flowpp.presets import PRESETS, resolve_model, resolve_training
from flowpp.run_directory import describe
from flowpp.spool import check_form
from worker.requests import TrainingRequest

_LIMITS = Limits(max_bytes=2**62, max_uncompressed_bytes=2**62, max_image_bytes=2**30)
"""The service has its own limits, which this command does not know."""


def checked(request: dict[str, Any]) -> TrainingRequest:
    """Returns a training request that was checked by itself, as the service does. Raises `typer.BadParameter`."""
    try:
        return TrainingRequest.model_validate(request)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(map(str, first["loc"]))
        fault = first["msg"].removeprefix("Value error, ")
        if first["type"] == "tuple_type":
            fault = f'write a JSON list in quotes, as --set \'{path}=["squeeze", "columns x4"]\''
        raise typer.BadParameter(f"{option_of(path)}: {fault}") from error


def check_before_upload(client: Client, source: Path, request: TrainingRequest) -> None:
    """Checks everything about training on the images of `source` that the command can know before it sends them.

    These are the service, the key and its scope, the checkpoint of a warm start, and whether model and recipe fit the
    first image and the number of images. Raises `typer.BadParameter`, `BadImages` and `ClientError`.
    """
    _check_scope(client)
    overrides = request.model.model_dump(exclude_none=True)
    preset = overrides.pop("preset")
    try:
        training = resolve_training(preset, request.training.model_dump(exclude_none=True))  # type: ignore[attr-defined]
        resolve_model(preset, overrides, PRESETS[preset].model.image_shape)
    except ValidationError as error:
        raise typer.BadParameter(f"these changes of preset {preset} do not hold: {describe(error)}") from error
    shape, count = survey(source, training.batch_size)
    try:
        model = resolve_model(preset, overrides, shape)
    except ValidationError as error:
        raise typer.BadParameter(f"preset {preset} does not fit the images of {source}: {describe(error)}") from error
    if count < training.batch_size:
        raise typer.BadParameter(
            f"{source} has {count:,} images, fewer than a batch of {training.batch_size:,}; use more images, or choose "
            "a smaller batch by --set training.batch_size=..."
        )
    if request.resume_from is not None:
        _check_origin(client, request.resume_from, model)


def _check_scope(client: Client) -> None:
    """Ends the command if the key may not upload. Raises `ClientError` if the service refuses or cannot be reached."""
    scopes = client.status().scopes
    if scopes is not None and not {"submit", "admin"} & set(scopes):
        fail(
            f"this key has the scope {', '.join(scopes)} only; `flowpp keys create --scope submit`, on the service's "
            "machine, makes one that may upload and train (scope_missing)",
            BAD_INPUT,
        )


def survey(source: Path, enough: int) -> tuple[Shape, int]:
    """Returns the shape of the images of `source`, and how many there are; reads no further than `enough` images.

    Raises `BadImages` if an image among them cannot be taken, or if there is none.
    """
    count = 0
    first, form = "", (0, 0, 0)
    for member in members(source, _LIMITS):
        for images in read_member(member, _LIMITS):
            first, form = (first, form) if count else (member.name, images.shape[1:])
            check_form(member.name, images.shape[1:], first, form)
            count += len(images)
        if count >= enough:
            break
    if not count:
        raise BadImages("no_images", "holds no images", str(source))
    height, width, channels = form
    return (channels, height, width), count


def _check_origin(client: Client, origin: str, model: ModelConfig) -> None:
    """Raises `typer.BadParameter` if a warm start from the checkpoint or job `origin` cannot begin this model."""
    if origin.startswith("job_"):
        client.jobs.get(origin)  # raises if there is no such job
        checkpoint = next(client.checkpoints.list(job=origin), None)
        if checkpoint is None:
            raise typer.BadParameter(f"--resume-from: job {origin} has no checkpoint yet")
    else:
        checkpoint = client.checkpoints.get(origin)
    if fault := model.unlike(ModelConfig.model_validate(checkpoint.model)):
        raise typer.BadParameter(f"--resume-from: {checkpoint.id} cannot start this model: {fault}")
