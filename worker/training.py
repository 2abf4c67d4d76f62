"""The task that supervises training: `python -m flowpp train` in a child process, its files told to the service."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from flowpp.checkpoint import BadCheckpoint, newest_complete, read_manifest, step_of
from flowpp.config import TrainingConfig
from flowpp.data import BadImages
from flowpp.divergence import Divergence
from flowpp.environment import clean
from flowpp.logs import about, variables
from flowpp.memory import advice
from flowpp.plan import DoesNotFit, taken_up
from flowpp.run_directory import CONFIG, CURVE, METRICS, RESULT, SAMPLES, TENSORBOARD, Result, RunDirectory
from flowpp.tracing import PARENT
from worker import child
from worker.artifacts import DamagedArtifact
from worker.attempt import held, prepare, say_process
from worker.child_log import heard, sentence
from worker.jobs import TERMINAL, Job, JobError, JobStatus, Outcome, StaleAttempt
from worker.lease import Lease
from worker.metrics import IMAGES
from worker.models import Checkpoint, best
from worker.pace import Pace
from worker.presence import own_offer
from worker.refusals import Conflict
from worker.service import Service

log = logging.getLogger(__name__)

LOG = "log.txt"
_ARTIFACTS = (CONFIG, METRICS, RESULT, CURVE, LOG)
_LOOK_SECONDS = 0.2
_MAX_LINE = 2_000
_LEAST_FREE_BYTES = 2**20  # for metrics and the log
_STORE_PAUSE_SECONDS = 1
_STORE_PATIENCE_SECONDS = 300
_BAD_INPUT = 2  # the command line's exit status for what another attempt would not mend


def train(service: Service, job: Job, shutdown: threading.Event) -> None:
    """Runs the attempt that has claimed `job`, to its end or until the worker is to shut down."""
    with about(**job.subject), Lease(service.jobs, [job]) as lease:
        log.info("attempt %d of job %s begins", job.attempt, job.id)
        try:
            status = _run(service, job, lease, shutdown)
        except Stopped:
            status = service.jobs.end(job, "stopped")
        except StaleAttempt as error:
            log.warning("%s; it was ended", error)
            lease.ended(job, None)
            return
        except Exception as error:
            failure = JobError(code="internal", message=f"{type(error).__name__}: {error}")
            log.exception("attempt %d of job %s crashed", job.attempt, job.id)
            status = service.jobs.end(job, "crashed", error=failure)
        lease.ended(job, status)
        log.info("attempt %d of job %s has ended: it is %s", job.attempt, job.id, status)
    if status in TERMINAL:
        shutil.rmtree(service.run_directory(job.id), ignore_errors=True)
    elif status == "queued":
        service.bells.ring("training", job.id)


class Stopped(Exception):
    """The job was to stop before its training process began."""


def _run(service: Service, job: Job, lease: Lease, shutdown: threading.Event) -> JobStatus:
    def asked() -> bool:
        if lease.lost(job):
            raise StaleAttempt(f"attempt {job.attempt} of job {job.id} has lost it")
        return shutdown.is_set() or lease.wish(job) != "running"

    def check() -> None:
        if asked():
            raise Stopped

    try:
        run, step = prepare(service, job, check)
    except (BadImages, DamagedArtifact) as error:
        return service.jobs.end(job, "failed", error=JobError(code="bad_dataset", message=str(error)))
    service.events.append(job, "log", {"line": _begins(job, step)})
    reporter = Reporter(service, job, run, step)
    process, out_of_memory = _supervise(service, job, run, reporter, asked, lease.traceparent(job))
    became, failure = outcome(run, process.status, process.asked)
    if failure is not None and out_of_memory:
        became, failure = "failed", JobError(code="out_of_memory", message=killed_for_memory(run))
    artifacts = _patiently(lambda: _store_all(service, job, run, reporter))
    status = service.jobs.end(job, became, error=failure, result=reporter.result(), artifacts=artifacts)
    reporter.delete_earlier_artifacts()
    return status


def _begins(job: Job, step: int) -> str:
    """Which attempt begins where, and why there is another one."""
    before = f"; the one before ended: {job.ended}" if job.ended else ""
    steps = job.plan["training"]["steps"]
    where = f"goes on from step {step:,} of {steps:,}" if step else f"begins the first of {steps:,} steps"
    return f"attempt {job.attempt} {where}{before}"


class Ended(NamedTuple):
    """How a child ended: its exit status, and whether it was asked to stop."""

    status: int
    asked: bool


def _supervise(
    service: Service, job: Job, run: RunDirectory, reporter: "Reporter", asked: Callable[[], bool], traceparent: str
) -> tuple[Ended, bool]:
    """Runs the child to its end; whether the kernel killed a process for memory then. Raises `StaleAttempt`."""
    environment = clean(os.environ) | variables(**job.subject) | {PARENT: traceparent}
    asked_at: float | None = None
    kills = memory_kills()
    with held(run) as lock:
        command = training_command(run, job.plan["training"].get("num_processes", 1), service.settings.grace_seconds)
        process = child.start(command, run.path / LOG, environment, pass_fds=[lock.fileno()])
        say_process(lock, process.pid)
    try:
        while not _ended(process):
            reporter.tell()
            if asked() and asked_at is None:
                asked_at = time.monotonic()
                process.terminate()
            elif asked_at is not None and time.monotonic() - asked_at > service.settings.grace_seconds:
                child.sweep(process)
    finally:
        child.sweep(process)
        process.wait()
    return Ended(process.returncode, asked_at is not None), memory_kills() > kills


def memory_kills() -> int:
    """Processes that this machine's kernel has killed for want of memory, since it started; 0 where it does not say."""
    counters = Path("/proc/vmstat")
    found = re.search(r"^oom_kill (\d+)$", counters.read_text(), re.MULTILINE) if counters.exists() else None
    return int(found[1]) if found else 0


def killed_for_memory(run: RunDirectory) -> str:
    """What to choose after the kernel has killed a run's process, which had the plan of its newest checkpoint."""
    config, newest = run.config, newest_complete(run.path)
    available = own_offer().of_process(config.training.num_processes)
    training = config.training
    with suppress(DoesNotFit):
        earlier = read_manifest(newest).training if newest else None
        training = taken_up(config.model, training, earlier, available)
    advised = advice(config.model, training, available)
    return f"the machine ran out of memory, and its kernel killed the training process: {advised}"


def training_command(run: RunDirectory, num_processes: int, grace_seconds: float) -> list[str | Path]:
    """What trains a run: one process, or a launcher of several, which passes SIGTERM on and gives them the time."""
    train: list[str | Path] = ["-m", "flowpp", "train", run.path]
    if num_processes == 1:
        return [sys.executable, *train]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return [sys.executable, *launch, f"--shutdown-timeout={max(1, int(grace_seconds))}", *train]


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def outcome(run: RunDirectory, status: int, asked: bool) -> tuple[Outcome, JobError | None]:
    """What the child's exit status and result.json mean."""
    path = run.path / RESULT
    if path.exists():
        result = Result.model_validate_json(path.read_bytes())
        if result.status == "failed":
            return "failed", JobError(code=result.code or "internal", message=result.message or "no reason given")
        return result.status, None
    if asked:  # before it could heed the signal, or after the grace period
        return "stopped", None
    last = sentence(child.tail(run.path / LOG, lines=1))
    if status < 0:
        name = signal.Signals(-status).name
        return "crashed", JobError(code="internal", message=f"the training process was ended by {name}")
    message = f"the training process ended with status {status}: {last}"
    return ("failed" if status == _BAD_INPUT else "crashed"), JobError(code="internal", message=message)


def _patiently(store: Callable[[], str]) -> str:
    """Tries again while the artifact store cannot be written, for `_STORE_PATIENCE_SECONDS`; then raises `OSError`."""
    deadline = time.monotonic() + _STORE_PATIENCE_SECONDS
    while True:
        try:
            return store()
        except OSError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("the artifact store is not there, and will be tried again: %s", error)
            time.sleep(_STORE_PAUSE_SECONDS)


def _store_all(service: Service, job: Job, run: RunDirectory, reporter: "Reporter") -> str:
    """Tells and stores what is left to, and then the artifacts; where these are. Raises `OSError`."""
    reporter.tell()
    reporter.store_checkpoints()
    return _store_artifacts(service, job, run, "last")


def _store_artifacts(service: Service, job: Job, run: RunDirectory, name: str) -> str:
    """Stores what the run has left beside its checkpoints; where. Raises `OSError`."""
    prefix = f"jobs/{job.id}/attempt-{job.attempt}-{name}"  # a stale attempt's are nobody's
    with tempfile.TemporaryDirectory() as directory:
        for artifact in _ARTIFACTS:
            if (run.path / artifact).exists():
                shutil.copyfile(run.path / artifact, Path(directory) / artifact)
        for folder in (SAMPLES, TENSORBOARD):
            if (run.path / folder).exists():
                shutil.copytree(run.path / folder, Path(directory) / folder, ignore=shutil.ignore_patterns(".*"))
        service.store.put(prefix, Path(directory), job.model_dump(mode="json"))
    return prefix


class Reporter:
    """Tells the service what appears in a run directory. Raises `StaleAttempt` from all of it."""

    def __init__(self, service: Service, job: Job, run: RunDirectory, began_at: int = 0) -> None:
        self._began_at = began_at  # the step of the checkpoint that the attempt goes on from
        self._counted = began_at
        self._service = service
        self._job = job
        self._run = run
        self._metrics = Tail(run.path / METRICS)
        self._log = Tail(run.path / LOG)
        self._stored = {checkpoint.step: checkpoint for checkpoint in service.checkpoints.of_job(job.id)}
        self._artifacts = [job.artifacts] if job.artifacts else []  # the last that the job's record named
        self._recipe = job.plan["training"]
        self._divergence = Divergence(job.plan["model"]["bits"], TrainingConfig(**self._recipe))
        self._pace = Pace(self._recipe["steps"])
        self._store_again_at = 0.0
        self._looked_at: dict[str, int] = {}
        self._disk_full = False
        self._catch_up()

    def tell(self) -> None:
        """Appends new metrics and log lines to the events, and stores new checkpoints."""
        self._tell_metrics([json.loads(line) for line in self._metrics.read()])
        for text in chain.from_iterable(map(heard, self._log.read())):
            self._service.events.append(self._job, "log", {"line": text[:_MAX_LINE]})
        self._warn_of_the_disk()
        if time.monotonic() >= self._store_again_at:
            try:
                self.store_checkpoints()
            except OSError as error:  # the run goes on, and keeps its checkpoints meanwhile
                self._store_again_at = time.monotonic() + _STORE_PAUSE_SECONDS
                self._warn(f"a checkpoint cannot be stored yet: {type(error).__name__}: {error}")

    def _warn_of_the_disk(self) -> None:
        """Once, when the next checkpoint would not fit: the run goes on meanwhile, and its own log may be full, too."""
        needed = max((checkpoint.bytes for checkpoint in self._stored.values()), default=0)
        free = shutil.disk_usage(self._run.path).free
        full = free < needed + _LEAST_FREE_BYTES
        if full and not self._disk_full:
            where = f"the disk of {self._run.path} has {free:,} bytes left, of which a checkpoint takes {needed:,}"
            self._warn(f"{where}; the run goes on and waits for room to write")
        self._disk_full = full

    def _warn(self, sentence: str) -> None:
        self._service.events.append(self._job, "warning", {"message": sentence[:_MAX_LINE]})

    def store_checkpoints(self) -> None:
        """Stores the checkpoints that are not. Raises `OSError` where the store cannot be written."""
        written = self._run.manifest_times()
        if written == self._looked_at:
            return
        for path in self._run.checkpoints():
            stored = self._stored.get(step_of(path))
            if stored is None or not _has_metrics(stored, path):
                self._store(path, instead_of=stored)
        self._looked_at = written

    def result(self) -> dict[str, Any]:
        """The job's result so far: its checkpoints, and the best validation bits/dim."""
        checkpoints = self._service.checkpoints.of_job(self._job.id)
        if not checkpoints:
            return {}
        chosen = best(checkpoints) or checkpoints[-1]
        return {
            "step": checkpoints[-1].step,
            "images_seen": checkpoints[-1].images_seen,
            "best_checkpoint": chosen.id,
            "last_checkpoint": checkpoints[-1].id,
            "validation_bits_per_dim": chosen.metrics.get("validation_bits_per_dim"),
        }

    def _catch_up(self) -> None:
        """Tells the metrics that the attempt before wrote and could not tell any more."""
        told = self._service.events.metrics(self._job.id)
        for row in told:
            self._divergence.take(row)
        last = told[-1]["step"] if told else 0
        self._tell_metrics([row for row in self._run.read_metrics() if row["step"] > last])
        self._pace = Pace(self._recipe["steps"])  # of this attempt's steps alone

    def _tell_metrics(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._service.events.append(self._job, "metrics", row)
            if warning := self._divergence.take(row):
                self._warn(warning)
        if rows:
            step = rows[-1]["step"]
            self._service.jobs.set_progress(self._job, self._pace.at(step))
            IMAGES.labels("training").inc(max(0, step - self._counted) * self._recipe["batch_size"])
            self._counted = max(self._counted, step)

    def _store(self, path: Path, instead_of: Checkpoint | None) -> None:
        try:
            checkpoint = self._service.checkpoints.register(path, self._job)
        except (BadCheckpoint, FileNotFoundError) as error:  # the run keeps only some of its checkpoints
            log.info("%s was not stored: %s", path, error)
            return
        self._stored[checkpoint.step] = checkpoint
        if checkpoint.step > self._began_at:
            self._service.jobs.forgive(self._job)
        data = {"id": checkpoint.id, "step": checkpoint.step, "metrics": checkpoint.metrics}
        self._service.events.append(self._job, "checkpoint", data)
        if instead_of is not None:
            self._delete(instead_of)
        self._prune()
        self._store_artifacts(checkpoint.step)

    def _store_artifacts(self, step: int) -> None:
        """Makes the job's artifacts those of now; who reads the ones before can still do so until the next time."""
        prefix = _store_artifacts(self._service, self._job, self._run, f"{step}")
        self._service.jobs.set_artifacts(self._job, prefix)
        self._artifacts = [*(earlier for earlier in self._artifacts if earlier != prefix), prefix]
        while len(self._artifacts) > 2:
            self._service.store.delete(self._artifacts.pop(0))

    def delete_earlier_artifacts(self) -> None:
        """Of the job's end there are others."""
        for prefix in self._artifacts:
            self._service.store.delete(prefix)

    def _prune(self) -> None:
        """Keeps the checkpoints in the store that `RunDirectory.prune` keeps."""
        checkpoints = self._service.checkpoints.of_job(self._job.id)
        since, chosen = self._divergence.suspected_since, best(checkpoints)
        before = [checkpoint.id for checkpoint in checkpoints if since is not None and checkpoint.step <= since]
        kept = [chosen.id] if chosen else before[-1:]
        for checkpoint in checkpoints[: -self._recipe["keep_checkpoints"]]:
            if checkpoint.id not in kept:
                self._delete(checkpoint)

    def _delete(self, checkpoint: Checkpoint) -> None:
        try:
            self._service.checkpoints.delete(checkpoint)
        except Conflict as error:
            log.info("kept: %s", error)


def _has_metrics(stored: Checkpoint, path: Path) -> bool:
    """Whether what is stored of a checkpoint has its metrics, which may have come after a resume."""
    try:
        return stored.metrics == read_manifest(path).metrics
    except BadCheckpoint:  # pruned meanwhile
        return True


class Tail:
    """The lines that come to the end of a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[bytes]:
        """The complete lines since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(min(self._offset, size))
            lines = [line for line in file.readlines() if line.endswith(b"\n")]
        self._offset = min(self._offset, size) + sum(map(len, lines))
        return lines
