"""What batches have come to, told to the service in a thread while the next batch is computed."""

import logging
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

from flowpp.arguments import NotFinite
from flowpp.devices import is_out_of_memory
from flowpp.logs import about
from flowpp.model import FlowPP
from worker.jobs import Job, JobError, JobStatus, Outcome, Progress, StaleAttempt
from worker.lease import Lease
from worker.service import Service
from worker.work import Work

log = logging.getLogger(__name__)

_MOST_BEHIND = 4
"""Batches that are told later than the next ones are computed."""


class Reached(NamedTuple):
    """How far a work is after a batch: the next one may have taken it further when it is told."""

    work: Work
    progress: Progress
    done: bool


class Results:
    """Tells one batch after the other, of jobs under `lease`. A context manager: its end waits for the last.

    `tell` and the end raise what telling an earlier batch has raised.
    """

    def __init__(self, service: Service, lease: Lease) -> None:
        self._service = service
        self._lease = lease
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="results")
        self._telling: deque[Future[None]] = deque()

    def tell(self, works: Sequence[Work], model: FlowPP) -> None:
        """Begins to tell the results of works that are finished, and the progress of the others."""
        while self._telling and (len(self._telling) >= _MOST_BEHIND or self._telling[0].done()):
            self._telling.popleft().result()
        reached = [Reached(work, work.pace.at(work.done), work.finished) for work in works]
        self._telling.append(self._thread.submit(self._tell, reached, model))

    def fail(self, job: Job, error: Exception) -> None:
        """Ends an attempt that cannot be computed, or whose result cannot be written."""
        if is_out_of_memory(error):
            found = JobError(code="out_of_memory", message="out of memory on the inference worker")
        elif isinstance(error, NotFinite):
            found = JobError(code="not_finite", message=str(error))
        else:
            found = JobError(code="internal", message=f"{type(error).__name__}: {error}")
        self.end(job, "failed", error=found)

    def end(self, job: Job, outcome: Outcome, **what: Any) -> JobStatus | None:
        """What the job now is; none where it was not this attempt's any more, which ends nobody else's batch."""
        self._lease.let_go(job)
        status: JobStatus | None = None
        try:
            status = self._service.jobs.end(job, outcome, **what)
        except StaleAttempt as error:
            log.warning("%s; what it did is dropped", error, extra=job.subject)
        self._lease.ended(job, status)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        for telling in self._telling:
            telling.result()

    def _tell(self, reached: Sequence[Reached], model: FlowPP) -> None:
        """A result that cannot be written fails its own job alone."""
        done = []
        for work, progress, _ in [each for each in reached if each.done]:
            try:
                done.append((work.job, *self._written(work, model), progress))
            except Exception as error:
                log.exception("the result of job %s cannot be written", work.job.id, extra=work.job.subject)
                self.fail(work.job, error)
        for job, *_ in done:
            self._lease.let_go(job)
        for (job, *_), status in zip(done, self._service.jobs.succeed(done) if done else (), strict=True):
            self._lease.ended(job, status)
            if status is None:
                said = "attempt %d of job %s is not the current one; what it did is dropped"
                log.warning(said, job.attempt, job.id, extra=job.subject)
        for each in reached:
            if not each.done:
                self._progress(each.work.job, each.progress)

    def _progress(self, job: Job, progress: Progress) -> None:
        try:
            self._service.jobs.set_progress(job, progress)
        except StaleAttempt as error:
            log.warning("%s; what it did is dropped", error, extra=job.subject)
            self._lease.let_go(job)
            self._lease.ended(job, None)

    def _written(self, work: Work, model: FlowPP) -> tuple[dict[str, Any], str]:
        """A work's result, and where its files are."""
        also = {"cold_start_seconds": work.cold_start_seconds}
        if not work.leaves_files:
            return work.result(model) | also, ""
        prefix = f"jobs/{work.job.id}/attempt-{work.job.attempt}"  # a stale attempt's are nobody's
        with tempfile.TemporaryDirectory() as directory, about(**work.job.subject):
            work.write(model, Path(directory))
            self._service.store.put(prefix, Path(directory), work.job.model_dump(mode="json"))
        return work.result(model) | also, prefix
