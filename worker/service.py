"""The job service without HTTP: what can be asked of it, over its records, its store and its queues."""

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from flowpp.checkpoint import BadCheckpoint
from flowpp.published import import_published
from worker.artifacts import ArtifactStore, Manifest
from worker.connection import connect
from worker.datasets import Datasets
from worker.events import Events
from worker.idempotency import Idempotency
from worker.jobs import Job, Jobs
from worker.keys import ANYBODY, Caller, Keys
from worker.models import Checkpoint, Checkpoints
from worker.queue import Doorbells, celery
from worker.refusals import Conflict, Invalid, NotFound, OverQuota
from worker.settings import Settings
from worker.webhooks import Webhooks

log = logging.getLogger(__name__)

_DELETING_SECONDS = 1.0


class Service:
    """All of it for one `Settings`: `jobs`, `events`, `datasets`, `checkpoints`, `store`. A context manager."""

    def __init__(self, settings: Settings, redis_retries: int = 3) -> None:
        self.settings = settings
        self.redis = connect(settings.redis_url, redis_retries)
        self.store = ArtifactStore(settings.store_url)
        cache = settings.data_directory.absolute() / "cache"
        self.jobs = Jobs(self.redis, settings.lease_seconds, settings.max_attempts, settings.result_ttl_seconds)
        self.events = Events(self.redis, settings.redis_url)
        self.datasets = Datasets(self.redis, self.store, cache)
        self.checkpoints = Checkpoints(self.redis, self.store, cache)
        self.keys = Keys(self.redis, self.store)
        self.webhooks = Webhooks(self.redis, self.store)
        self.idempotency = Idempotency(self.redis)
        self.celery = celery(settings.redis_url)
        self.bells = Doorbells(self.celery)

    def close(self) -> None:
        self.celery.close()
        self.redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_bytes(self, caller: Caller) -> None:
        """Raises `OverQuota` where the caller's owner stores as much as it may."""
        quota = caller.quota.max_bytes
        most = self.settings.max_bytes_per_owner if quota is None else quota
        counted: Any = self.redis.hget("flowpp:bytes", caller.owner)
        stored = int(counted or 0)
        if stored >= most:
            raise OverQuota(
                f"{caller.owner} stores {stored:,} bytes, and may store {most:,}: delete datasets or checkpoints first"
            )

    def import_checkpoint(self, file: Path, preset: str, caller: Caller = ANYBODY, claim: str = "") -> Checkpoint:
        """Registers the checkpoint made of the authors' .npz file. Raises `Invalid`, which lists what does not fit."""
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = Path(directory) / "checkpoint"
            try:
                import_published(file, preset, checkpoint)
            except BadCheckpoint as error:
                raise Invalid("bad_checkpoint", str(error), "file") from error
            return self.checkpoints.register(checkpoint, owner=caller.owner, claim=claim)

    def resume(self, job_id: str) -> Job:
        """As `Jobs.resume`, and wakes a worker."""
        job = self.jobs.resume(job_id)
        if job.status == "queued":
            self.bells.ring(job.queue, job.id)
        return job

    def delete_job(self, job_id: str) -> bool:
        """Removes a job, its checkpoints and all that is stored of it; false where it is cancelled first.

        Such a job is removed as soon as its worker has let go of it. Raises `NotFound` and `Conflict`.
        """
        checkpoints = self.checkpoints.of_job(job_id)
        if not self.jobs.delete(job_id):
            return False
        for checkpoint in checkpoints:
            self.checkpoints.free(checkpoint)
        self.store.delete(f"jobs/{job_id}")
        shutil.rmtree(self.run_directory(job_id), ignore_errors=True)  # there is one where it was paused
        return True

    def delete_ended(self) -> int:
        """Removes the jobs that were to be, and have ended since; how many."""
        deleted = 0
        for job_id in self.jobs.deleting():
            try:
                if self.jobs.get(job_id).finished:
                    deleted += self.delete_job(job_id)
            except NotFound:
                log.info("job %s was deleted by another process", job_id)
            except Conflict as error:  # tried again, when the reaper looks again
                log.info("job %s is not deleted yet: %s", job_id, error)
        return deleted

    def delete_expired(self) -> int:
        """Removes likelihood and sampling jobs that are older than their results are kept; how many.

        It goes on for about a second, as the reaper has other things to do.
        """
        deleted = 0
        until = time.monotonic() + _DELETING_SECONDS
        while time.monotonic() < until and (expired := self.jobs.expired()):
            for job_id in expired:
                try:
                    self.store.delete(f"jobs/{job_id}")  # first, so that it is tried again where the store is away
                    deleted += self.delete_job(job_id)
                except NotFound:
                    log.info("job %s was deleted by another process", job_id)
                except OSError as error:
                    log.warning("job %s has expired and is not deleted yet: %s", job_id, error)
                    return deleted
        return deleted

    def artifacts(self, job: Job) -> Manifest:
        """The files that a job has left. Raises `NotFound` where it has left none yet."""
        if not job.artifacts:
            raise NotFound("artifact_not_found", f"job {job.id} is {job.status} and has stored no artifacts")
        return self.store.manifest(job.artifacts)

    def run_directory(self, job_id: str) -> Path:
        """Where a training job's process works, on the machine that it is on."""
        return self.settings.data_directory.absolute() / "runs" / job_id
