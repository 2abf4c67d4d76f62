"""The run directory of an attempt at a training job, taken over from the attempt before, or from the store.

Each attempt has a directory of its own, so that one which does not yet know that it is stale cannot disturb the
next. The training process holds a lock in it, by which the next attempt knows that it still runs, and ends it.
"""

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from flowpp.checkpoint import newest_complete, read_manifest
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.durable import replace_file
from flowpp.run_directory import CONFIG, METRICS, RESULT, RunConfig, RunDirectory
from worker.artifacts import DamagedArtifact, no_check
from worker.jobs import Job
from worker.refusals import NotFound
from worker.service import Service

_LOCK = "process"
_EVICTION_SECONDS = 10  # longer than the kernel takes to end a process that was killed


class ProcessRemains(RuntimeError):
    """The training process of an earlier attempt cannot be ended."""


def prepare(service: Service, job: Job, check: Callable[[], None] = no_check) -> tuple[RunDirectory, int]:
    """The attempt's run directory, with its configuration, and the newest checkpoint and the metrics up to it.

    Also the step of that checkpoint, or 0. While it copies it calls `check`, which may raise. Raises
    `flowpp.data.BadImages`, `DamagedArtifact` (of the images) and `ProcessRemains`.
    """
    run = _take_over(service.run_directory(job.id), job.attempt)
    check()
    images = service.datasets.open(job.request["dataset"], check)
    origin = job.plan.get("resume_from")
    config = RunConfig(
        model=ModelConfig(**job.plan["model"]),
        training=TrainingConfig(**job.plan["training"]),
        data=str(images.directory),
        resume_from=None if origin is None else str(service.checkpoints.fetch(service.checkpoints.get(origin), check)),
    )
    replace_file(run.path / CONFIG, config.model_dump_json(indent=2).encode() + b"\n")
    (run.path / RESULT).unlink(missing_ok=True)
    step = _restore_checkpoint(service, job, run, check)
    _restore_metrics(service, job, run, step)
    return run, step


@contextmanager
def held(run: RunDirectory) -> Iterator[IO[str]]:
    """A lock for the training process to inherit; who starts the process writes its id into the file."""
    with (run.path / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file


def _take_over(folder: Path, attempt: int) -> RunDirectory:
    run = RunDirectory(folder / str(attempt))
    earlier = sorted((path for path in folder.glob("[0-9]*") if path.name != str(attempt)), key=lambda p: int(p.name))
    for path in earlier:
        _evict(path)
    if earlier and not run.path.exists():
        earlier[-1].rename(run.path)
    for path in earlier[:-1]:
        shutil.rmtree(path)
    run.path.mkdir(parents=True, exist_ok=True)
    return run


def _evict(path: Path) -> None:
    """Ends the training process that works in a run directory, if one does."""
    lock = path / _LOCK
    if not lock.exists():
        return
    deadline = time.monotonic() + _EVICTION_SECONDS
    with lock.open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ProcessRemains(f"the process that trains in {path} does not end") from None
            file.seek(0)
            if process := file.read():
                with suppress(ProcessLookupError):
                    os.killpg(int(process), signal.SIGKILL)
            time.sleep(0.05)


def _restore_checkpoint(service: Service, job: Job, run: RunDirectory, check: Callable[[], None]) -> int:
    """Copies the newest checkpoint from the store where it is newer than the directory's own; its step, or 0."""
    own = newest_complete(run.path)
    step = read_manifest(own).step if own else 0
    for checkpoint in reversed(service.checkpoints.of_job(job.id)):
        if checkpoint.step <= step:
            break
        shutil.rmtree(run.checkpoint(checkpoint.step), ignore_errors=True)  # a damaged one
        try:
            service.checkpoints.copy(checkpoint, run.checkpoint(checkpoint.step), check)
        except (DamagedArtifact, NotFound) as error:
            said = f"checkpoint {checkpoint.id} of step {checkpoint.step} is damaged, and passed over: {error}"
            service.events.append(job, "warning", {"message": said})
            continue
        return checkpoint.step
    return step


def _restore_metrics(service: Service, job: Job, run: RunDirectory, step: int) -> None:
    if not (run.path / METRICS).exists():
        rows = "".join(json.dumps(row) + "\n" for row in service.events.metrics(job.id))
        replace_file(run.path / METRICS, rows.encode())
    run.truncate_metrics(step)


def say_process(file: IO[str], process: int) -> None:
    """Writes the process's id into its lock."""
    file.write(str(process))
    file.flush()
