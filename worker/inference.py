"""The task that answers likelihood and sampling requests: in batches, on warm models."""

import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from flowpp.devices import is_out_of_memory
from flowpp.model import FlowPP
from worker.jobs import Job, JobError, JobStatus, Outcome, Progress, StaleAttempt
from worker.lease import Lease
from worker.service import Service
from worker.warm import WarmModels
from worker.work import WORK, Work

log = logging.getLogger(__name__)

LINGER_SECONDS = 0.05
"""For so long the worker looks for a next job before it waits for a bell, which takes longer."""

_LOOK_SECONDS = 0.005


class Inference:
    """The inference worker: answers one batch after the other."""

    def __init__(self, service: Service, name: str, shutdown: threading.Event) -> None:
        self._service = service
        self._name = name
        self._shutdown = shutdown
        self._models = WarmModels(service.checkpoints, service.settings.model_cache_bytes)

    def drain(self) -> None:
        """Answers all that waits, and what comes shortly after."""
        until = time.monotonic()
        while not self._shutdown.is_set():
            if jobs := self._service.jobs.claim("inference", self._name, self._service.settings.batch_size):
                self.answer(jobs)
                until = time.monotonic() + LINGER_SECONDS
            elif time.monotonic() >= until:
                return
            else:
                time.sleep(_LOOK_SECONDS)

    def answer(self, jobs: list[Job]) -> None:
        """Answers claimed jobs of one group."""
        with Lease(self._service.jobs, jobs) as lease:
            self._answer(jobs, lease)

    def _answer(self, jobs: list[Job], lease: Lease) -> None:
        """Answers jobs together, or one by one where together they fail."""
        try:
            self._compute(jobs, lease)
        except Exception as error:
            unanswered = [job for job in jobs if lease.holds(job)]
            log.exception("a batch of %d jobs failed", len(jobs))
            if len(jobs) == 1:
                self._fail(jobs[0], lease, error)
            else:
                for job in unanswered:
                    self._answer([job], lease)

    def _compute(self, jobs: list[Job], lease: Lease) -> None:
        """Each row of the jobs in its turn; a job is answered with its last row."""
        model = self._models.get(self._service.checkpoints.get(jobs[0].plan["checkpoint"]))
        kind = WORK[jobs[0].type]
        works = [kind(self._service, job) for job in jobs]
        rows = [(work, index) for work in works for index in range(work.count)]
        batch_size = self._service.settings.batch_size
        length = max(1, batch_size // jobs[0].request.get("importance_samples", 1))
        for start in range(0, len(rows), length):
            self._stop_unwanted(works, lease)
            batch = [(work, index) for work, index in rows[start : start + length] if lease.holds(work.job)]
            if batch:
                for (work, _), row in zip(batch, kind.compute(model, batch, batch_size), strict=True):
                    work.rows.append(row)
                for work in dict.fromkeys(work for work, _ in batch):
                    self._tell(work, model, lease)

    def _stop_unwanted(self, works: list[Work], lease: Lease) -> None:
        """Lets go of jobs that are to be cancelled, that were lost, or for which there is no time any more."""
        for job in [work.job for work in works if lease.holds(work.job)]:
            if lease.lost(job):
                lease.let_go(job)
                continue
            unwanted = self._shutdown.is_set() or lease.wish(job) != "running"
            if unwanted and self._end(job, lease, "stopped") == "queued":
                self._service.bells.ring("inference", job.id)

    def _tell(self, work: Work, model: FlowPP, lease: Lease) -> None:
        """Tells the progress of a job, or its result."""
        job = work.job
        try:
            self._service.jobs.set_progress(job, Progress.at(len(work.rows), work.count))
        except StaleAttempt as error:
            log.warning("%s; what it did is dropped", error)
            lease.let_go(job)
            return
        if len(work.rows) == work.count:
            with tempfile.TemporaryDirectory() as directory:
                result = work.write(model, Path(directory))
                prefix = f"jobs/{job.id}/attempt-{job.attempt}"  # a stale attempt's are nobody's
                self._service.store.put(prefix, Path(directory), job.model_dump(mode="json"))
            self._end(job, lease, "succeeded", result=result, artifacts=prefix)

    def _fail(self, job: Job, lease: Lease, error: Exception) -> None:
        out_of_memory = is_out_of_memory(error)
        code = "out_of_memory" if out_of_memory else "internal"
        message = "out of memory on the inference worker" if out_of_memory else f"{type(error).__name__}: {error}"
        self._end(job, lease, "failed", error=JobError(code=code, message=message))

    def _end(self, job: Job, lease: Lease, outcome: Outcome, **what: Any) -> JobStatus | None:
        """What the job now is; none where it was not this attempt's any more, which ends nobody else's batch."""
        lease.let_go(job)
        try:
            return self._service.jobs.end(job, outcome, **what)
        except StaleAttempt as error:
            log.warning("%s; what it did is dropped", error)
            return None
