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

LINGER_SECONDS = 1.0
"""For so long the worker looks for a next job before it waits for a bell, which may take kombu a second to hear."""

_LOOK_SECONDS = 0.005
_AWAKE_SECONDS = 2.0
_LARGES = 2


class Inference:
    """The inference worker: one batch after the other, of whatever waits for the same model when it begins.

    A job larger than a batch takes part in many; two such are held at a time, beside as many small ones as a batch
    takes, and each job held has as many rows of a batch as the others: none waits for a large one's end.
    """

    def __init__(self, service: Service, name: str, shutdown: threading.Event) -> None:
        self._service = service
        self._name = name
        self._shutdown = shutdown
        self._models = WarmModels(service.checkpoints, service.settings.model_cache_bytes)
        self._batch_size = service.settings.batch_size

    def drain(self) -> None:
        """Answers all that waits, and what comes shortly after."""
        works: list[Work] = []
        until = time.monotonic()
        with Lease(self._service.jobs, []) as lease:
            while works or not self._shutdown.is_set():
                if not self._shutdown.is_set():
                    works += self._begun(self._claim(works), lease)
                if works:
                    works = self._step(works, lease)
                    until = time.monotonic() + LINGER_SECONDS
                elif time.monotonic() < until:
                    time.sleep(_LOOK_SECONDS)
                elif self._service.jobs.sleep("inference", self._name):
                    return

    def answer(self, jobs: list[Job]) -> None:
        """Answers claimed jobs."""
        with Lease(self._service.jobs, []) as lease:
            works = self._begun(jobs, lease)
            while works:
                works = self._step(works, lease)

    def _claim(self, works: list[Work]) -> list[Job]:
        """Jobs that the next batch has room for."""
        larges = sum(_size(work) > self._batch_size for work in works)
        room = self._batch_size - sum(_size(work) for work in works if _size(work) <= self._batch_size)
        if room <= 0:
            return []
        return self._service.jobs.claim(
            "inference",
            self._name,
            room,
            large=self._batch_size,
            larges=_LARGES - larges,
            awake_seconds=_AWAKE_SECONDS,
        )

    def _begun(self, jobs: list[Job], lease: Lease) -> list[Work]:
        """What claimed jobs compute; those whose images cannot be had fail."""
        works = []
        for job in jobs:
            lease.hold(job)
        for job in jobs:
            try:
                works.append(WORK[job.type](self._service, job))
            except Exception as error:
                log.exception("job %s cannot begin", job.id)
                self._fail(job, lease, error)
        return works

    def _step(self, works: list[Work], lease: Lease) -> list[Work]:
        """One batch, for the group that has waited longest; what is left to do, that group last."""
        self._stop_unwanted(works, lease)
        works = [work for work in works if lease.holds(work.job)]
        if not works:
            return []
        mine = [work for work in works if work.job.group == works[0].job.group]
        others = [work for work in works if work.job.group != works[0].job.group]
        self._compute(mine, lease)
        return others + [work for work in mine if lease.holds(work.job)]

    def _compute(self, works: list[Work], lease: Lease) -> None:
        """A batch of works of one group, or one of each of them, where together they fail."""
        try:
            self._batch(works, lease)
        except Exception as error:
            log.exception("a batch of %d jobs failed", len(works))
            if len(works) == 1:
                self._fail(works[0].job, lease, error)
            else:
                for work in works:
                    if lease.holds(work.job):
                        self._compute([work], lease)

    def _batch(self, works: list[Work], lease: Lease) -> None:
        model = self._model(works)
        kind = WORK[works[0].job.type]
        rows = _shares(works, max(1, self._batch_size // _samples(works[0])))
        for work, _ in rows:
            if not work.rows:
                work.pace.at(0)
        results = kind.compute(model, rows, self._batch_size)
        for (work, _), row in zip(rows, results, strict=True):
            work.rows.append(row)
        self._tell(list(dict.fromkeys(work for work, _ in rows)), model, lease)

    def _model(self, works: list[Work]) -> FlowPP:
        """The works' model, loaded where it was not; what that took is in their results."""
        checkpoint = self._service.checkpoints.get(works[0].job.plan["checkpoint"])
        cold, started = checkpoint.id not in self._models, time.monotonic()
        model = self._models.get(checkpoint)
        for work in works if cold else ():
            work.cold_start_seconds = round(time.monotonic() - started, 3)
        return model

    def _stop_unwanted(self, works: list[Work], lease: Lease) -> None:
        """Lets go of jobs that are to be cancelled, that were lost, or for which there is no time any more."""
        for job in [work.job for work in works if lease.holds(work.job)]:
            if lease.lost(job):
                lease.let_go(job)
                continue
            unwanted = self._shutdown.is_set() or lease.wish(job) != "running"
            if unwanted and self._end(job, lease, "stopped") == "queued":
                self._service.bells.ring("inference", job.id)

    def _tell(self, works: list[Work], model: FlowPP, lease: Lease) -> None:
        """Tells the results of jobs that are done, and the progress of the others; one that cannot be told fails."""
        done = []
        for work in [work for work in works if not work.left]:
            try:
                done.append((work.job, *self._written(work, model), Progress.at(work.count, work.count)))
            except Exception as error:
                log.exception("the result of job %s cannot be written", work.job.id)
                self._fail(work.job, lease, error)
        for job, *_ in done:
            lease.let_go(job)
        for (job, *_), status in zip(done, self._service.jobs.succeed(done) if done else (), strict=True):
            if status is None:
                log.warning("attempt %d of job %s is not the current one; what it did is dropped", job.attempt, job.id)
        for work in [work for work in works if work.left]:
            self._progress(work.job, work.pace.at(len(work.rows)), lease)

    def _progress(self, job: Job, progress: Progress, lease: Lease) -> None:
        try:
            self._service.jobs.set_progress(job, progress)
        except StaleAttempt as error:
            log.warning("%s; what it did is dropped", error)
            lease.let_go(job)

    def _written(self, work: Work, model: FlowPP) -> tuple[dict[str, Any], str]:
        """A work's result, and where its files are."""
        with tempfile.TemporaryDirectory() as directory:
            result = work.write(model, Path(directory)) | {"cold_start_seconds": work.cold_start_seconds}
            if not work.leaves_files:
                return result, ""
            prefix = f"jobs/{work.job.id}/attempt-{work.job.attempt}"  # a stale attempt's are nobody's
            self._service.store.put(prefix, Path(directory), work.job.model_dump(mode="json"))
        return result, prefix

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


def _samples(work: Work) -> int:
    """Rows of a forward pass that one row of the work is."""
    return int(work.job.request.get("importance_samples", 1))


def _size(work: Work) -> int:
    """Rows of a forward pass that are still to be computed for it."""
    return work.left * _samples(work)


def _shares(works: list[Work], length: int) -> list[tuple[Work, int]]:
    """Up to `length` rows, in turns of one from each work, that follow those that each has."""
    rows: list[tuple[Work, int]] = []
    for turn in range(length):
        for work in works:
            if turn < work.left and len(rows) < length:
                rows.append((work, len(work.rows) + turn))
        if len(rows) == length:
            break
    return rows
