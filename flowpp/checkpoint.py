"""Checkpoints: directories of safetensors files and a manifest, which is written last. Needs no torch.

`flowpp.weights` reads and writes the tensors.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StringConstraints, ValidationError

from flowpp.config import Frozen, ModelConfig, TrainingConfig
from flowpp.divergence import DIVERGED, VALIDATION
from flowpp.durable import new_directory, new_file, replace_file, sync_file

MANIFEST = "manifest.json"
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"

_MAX_MANIFEST_BYTES = 2**20
_PIECE_BYTES = 2**23
_NAME = re.compile(r"step-[0-9]{8,}")


class BadCheckpoint(ValueError):
    """A checkpoint that is missing, incomplete, damaged or of another kind; the message names the file."""


Quantiles = Annotated[list[float], Field(min_length=101, max_length=101)]
QUANTILES = "Bits/dim of the validation images at 0, 1, ..., 100 %, where they were scored at this step."


class StoredFile(Frozen):
    """Size in bytes and content hash of a file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Frozen):
    """Content of `manifest.json`: what the checkpoint is of, and the files that belong to it."""

    format: Literal[1] = 1
    model: ModelConfig
    training: TrainingConfig | None = Field(None, description="The recipe; none where the model was only saved.")
    step: int = Field(0, ge=0, description="Optimizer steps taken.")
    images_seen: int = Field(0, ge=0)
    metrics: dict[str, float] = Field({}, description="Of this very step; validation only where it was evaluated.")
    validation_quantiles: Quantiles | None = Field(None, description=QUANTILES)
    unlogged: dict[str, float] = Field({}, description="Sums over the steps since the last metrics, for a resume.")
    learning_rate_factor: float = Field(1, gt=0, le=1, description="Less than 1 after the run was rolled back.")
    dataset_sha256: str | None = Field(None, description="Content hash of the image set.")
    warm_start_sha256: str | None = Field(None, description="Of the weights that the run began with, if with others'.")
    source_sha256: str | None = Field(None, description="Of the authors' file that the weights came from.")
    created_at: float = Field(description="Unix time in seconds.")
    files: dict[Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+\.safetensors$")], StoredFile]


def checkpoint_name(step: int) -> str:
    """`step-00000100`: names sort by step up to 10**8 steps."""
    return f"step-{step:08d}"


def write_directory(directory: Path, writers: Mapping[str, Callable[[Path], None]], **manifest: Any) -> None:
    """Writes the new `directory`, whole or not at all: the file of each name by its writer, then the manifest.

    `manifest` are the fields of `Manifest` but `format`, `created_at` and `files`. Raises `FileExistsError` where
    `directory` exists.
    """
    with new_directory(directory) as unfinished:
        files = {}
        for name, write in writers.items():
            write(unfinished / name)
            sync_file(unfinished / name)
            files[name] = describe_file(unfinished / name)
        complete = Manifest(created_at=time.time(), files=files, **manifest)
        with new_file(unfinished / MANIFEST) as file:
            file.write(complete.model_dump_json(indent=2).encode())


def complete_checkpoint(
    directory: Path, metrics: Mapping[str, float], quantiles: Sequence[float] | None, unlogged: Mapping[str, float]
) -> None:
    """Gives a checkpoint that was written before its step was evaluated what it lacked."""
    lacked = {"metrics": dict(metrics), "validation_quantiles": quantiles, "unlogged": dict(unlogged)}
    manifest = read_manifest(directory).model_copy(update=lacked)
    replace_file(directory / MANIFEST, manifest.model_dump_json(indent=2).encode())


def weights_file(manifest: Manifest) -> str:
    """The file of the weights that score and sample: the moving average's, where there is one."""
    return EMA if EMA in manifest.files else MODEL


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint whose files are there at the right size. Raises `BadCheckpoint`."""
    path = directory / MANIFEST
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"it holds no {MANIFEST}" if directory.is_dir() else "there is no such directory"
        raise BadCheckpoint(f"{directory} is no checkpoint: {what}") from error
    if len(content) > _MAX_MANIFEST_BYTES:
        raise BadCheckpoint(f"{path} has more than {_MAX_MANIFEST_BYTES:,} bytes, which no manifest has")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise BadCheckpoint(f"{path} is not a manifest of format 1: {place}: {first['msg']}") from error
    if MODEL not in manifest.files:
        raise BadCheckpoint(f"{path} lists no {MODEL}")
    for name, stored in manifest.files.items():
        _check_size(directory / name, stored)
    return manifest


def verify(directory: Path) -> Manifest:
    """The manifest, after every file was read and its sha256 found right. Raises `BadCheckpoint`."""
    manifest = read_manifest(directory)
    for name, stored in manifest.files.items():
        check_file(directory / name, stored)
    return manifest


def check_file(path: Path, stored: StoredFile) -> None:
    """Raises `BadCheckpoint` where size or sha256 of the file are not those of the manifest."""
    _check_size(path, stored)
    if describe_file(path).sha256 != stored.sha256:
        raise BadCheckpoint(f"{path} is damaged: its sha256 is not the one that {MANIFEST} says")


def describe_file(path: Path) -> StoredFile:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
        return StoredFile(bytes=file.tell(), sha256=digest.hexdigest())


def checkpoint_directories(run_directory: Path) -> list[Path]:
    """What is named like a checkpoint of the run, complete or not, oldest first."""
    found = [path for path in (run_directory / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def complete_checkpoints(run_directory: Path) -> Iterator[Path]:
    """The checkpoints of a run whose manifest and file sizes are right, oldest first."""
    for path in checkpoint_directories(run_directory):
        try:
            read_manifest(path)
        except BadCheckpoint:
            continue  # a half copied one; whoever asks for the complete ones knows what to do without it
        yield path


def newest_complete(run_directory: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, sha256 included; none where there is none."""
    for path in reversed(list(complete_checkpoints(run_directory))):
        try:
            verify(path)
        except BadCheckpoint:
            continue  # the one before it is worth more than none
        return path
    return None


_C = TypeVar("_C")


def chosen(checkpoints: Sequence[_C], metrics: Sequence[Mapping[str, float]]) -> _C | None:
    """Returns the best of a run's checkpoints, oldest first, by their `metrics`; None if the metrics do not decide.

    Checkpoints from before the run diverged come first. The best has the lowest validation bits/dim of them. If none
    was validated, it is the newest of them, or None if no checkpoint is from after that.
    """
    all_of_them = list(zip(checkpoints, metrics, strict=True))
    good = [(each, held) for each, held in all_of_them if DIVERGED not in held] or all_of_them
    validated = [(held[VALIDATION], index) for index, (_, held) in enumerate(good) if VALIDATION in held]
    if validated:
        return good[min(validated)[1]][0]
    return good[-1][0] if good and len(good) < len(all_of_them) else None


def step_of(path: Path) -> int:
    """The step of a checkpoint that `checkpoint_name` named."""
    return int(path.name.removeprefix("step-"))


def _check_size(path: Path, stored: StoredFile) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path} is missing, though {MANIFEST} lists it") from error
    if size != stored.bytes:
        raise BadCheckpoint(f"{path} is damaged: it has {size:,} bytes, and {MANIFEST} says {stored.bytes:,}")
