"""The directory of one training run: its configuration, metrics, checkpoints and result. Needs no torch."""

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from flowpp.checkpoint import (
    MANIFEST,
    BadCheckpoint,
    checkpoint_directories,
    checkpoint_name,
    chosen,
    complete_checkpoint,
    complete_checkpoints,
    newest_complete,
    read_manifest,
    step_of,
)
from flowpp.config import Frozen, ModelConfig, TrainingConfig
from flowpp.divergence import DIVERGED
from flowpp.durable import replace_file

CONFIG, METRICS, RESULT, CURVE = "config.json", "metrics.jsonl", "result.json", "training_curve.png"
SAMPLES, TENSORBOARD = "samples", "tensorboard"

Code = Literal["out_of_memory", "nan_loss", "diverged", "bad_dataset", "disk_full", "internal"]
"""Why a run failed."""


class RunConfig(Frozen):
    """Content of `config.json`: all that a run needs."""

    model: ModelConfig
    training: TrainingConfig
    data: str = Field(min_length=1, description="Path of the image set, or of a folder or archive of images.")
    resume_from: str | None = Field(
        None, description="Warm start: the checkpoint directory whose weights and average the run begins with."
    )
    test_as_validation: bool = Field(False, description="The test images of `data` are the validation part.")


class Result(Frozen):
    """Content of `result.json`. Checkpoints are named as in `checkpoints/`; the best is `best_checkpoint`'s."""

    status: Literal["succeeded", "stopped", "failed"]
    step: int = 0
    code: Code | None = None
    message: str | None = None
    best_checkpoint: str | None = None
    last_checkpoint: str | None = None


class TrainingError(Exception):
    """A run that failed: why, as a stable `code` and a sentence, and at which step, where that is known."""

    def __init__(self, code: Code, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.step = step


class BadRunDirectory(ValueError):
    """A run directory that cannot be read or taken up; the message names the file."""


@dataclass(frozen=True)
class RunDirectory:
    """`path` with the files of a run in it."""

    path: Path

    @property
    def config(self) -> RunConfig:
        """Raises `BadRunDirectory` where there is none, or one that does not hold."""
        path = self.path / CONFIG
        try:
            return RunConfig.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise BadRunDirectory(f"{path} is missing") from error
        except ValidationError as error:
            raise BadRunDirectory(f"{path}: {describe(error)}") from error

    def write_config(self, config: RunConfig) -> None:
        """Makes the directory a run's. Raises `BadRunDirectory` where it already is that of another one."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / CONFIG).exists():
            replace_file(self.path / CONFIG, config.model_dump_json(indent=2).encode() + b"\n")
        elif self.config != config:
            raise BadRunDirectory(
                f"{self.path / CONFIG} is of another run; choose another directory, or repeat its own"
            )

    def append_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines to metrics.jsonl: all of them, or none where that raises `OSError`."""
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        with (self.path / METRICS).open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / METRICS))
            except OSError:
                file.truncate(size)
                raise

    def sync_metrics(self) -> None:
        """Returns when the lines are on disk, as they must be before a checkpoint that goes on after them."""
        with (self.path / METRICS).open("a") as file:
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, but a last one that was not finished."""
        path = self.path / METRICS
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def truncate_metrics(self, step: int) -> None:
        """Removes the lines after `step`, so that no step appears twice when it is taken again."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = 0
        with path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                kept += len(line)
            file.truncate(kept)
            os.fsync(file.fileno())

    @property
    def images(self) -> Path:
        """Where an image set is kept that was built for this run."""
        return self.path / "images"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is or shall be."""
        return self.path / "checkpoints" / checkpoint_name(step)

    def samples(self, step: int) -> Path:
        """Where the samples of a step are or shall be: a grid as PNG."""
        return self.path / SAMPLES / f"{checkpoint_name(step)}.png"

    def best_checkpoint(self) -> Path | None:
        """The complete checkpoint of the lowest validation bits/dim, among those that were validated.

        Checkpoints of before the run diverged come first: without validation, the newest of them if there are others.
        """
        paths = self.checkpoints()
        return chosen(paths, [read_manifest(path).metrics for path in paths])

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return list(complete_checkpoints(self.path))

    def manifest_times(self) -> dict[str, int]:
        """When, in nanoseconds, the manifest of each checkpoint was written: they change where checkpoints do."""
        found = {}
        for path in checkpoint_directories(self.path):
            with suppress(FileNotFoundError):  # removed meanwhile, or not there yet
                found[path.name] = (path / MANIFEST).stat().st_mtime_ns
        return found

    def prune(self, keep: int, suspected_since: int | None = None) -> None:
        """Removes all checkpoints but the newest `keep` and the best.

        If there is no best one, it also keeps the last one up to the step `suspected_since`.
        """
        paths, best = self.checkpoints(), self.best_checkpoint()
        before = [path for path in paths if suspected_since is not None and step_of(path) <= suspected_since]
        kept = {*paths[-keep:], *([best] if best else before[-1:])}
        for path in paths:
            if path not in kept:
                _remove(path)

    def mark_diverged(self, since: int) -> None:
        """Gives the checkpoints after step `since` the metric of a run that has diverged, so that none is the best."""
        for path in self.checkpoints():
            manifest = read_manifest(path)
            if step_of(path) > since and DIVERGED not in manifest.metrics:
                metrics = manifest.metrics | {DIVERGED: float(step_of(path) - since)}
                complete_checkpoint(path, metrics, manifest.validation_quantiles, manifest.unlogged)

    def sweep(self, step: int) -> None:
        """Removes what an interrupted run left: unfinished checkpoints, and those after `step`."""
        for path in (self.path / "checkpoints").glob(".step-*.tmp"):
            shutil.rmtree(path)
        for path in checkpoint_directories(self.path):
            if step_of(path) > step:
                _remove(path)

    def write_result(self, result: Result) -> Result:
        """Completes the result with the names of the checkpoints, and writes result.json."""
        names = [path.name for path in self.checkpoints()]
        best = self.best_checkpoint()
        complete = result.model_copy(
            update={
                "last_checkpoint": names[-1] if names else None,
                "best_checkpoint": best.name if best else None,
            }
        )
        replace_file(self.path / RESULT, complete.model_dump_json(indent=2).encode() + b"\n")
        return complete


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint, wholly or not at all for who looks for complete ones."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed.tmp")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def describe(error: ValidationError) -> str:
    """The first fault of a configuration in one sentence: field, bound and value."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    value = first["input"]
    shown = f", not {value!r}" if isinstance(value, str | int | float) else ""
    return f"{field}: {message}{shown}" if field else message


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or a run directory's best one, or its newest where none was validated."""
    if not (path / CONFIG).is_file():
        read_manifest(path)
        return path
    found = RunDirectory(path).best_checkpoint() or newest_complete(path)
    if found is None:
        raise BadCheckpoint(f"the run in {path} has no complete checkpoint yet")
    return found
