"""The task that answers likelihood and sampling requests: in batches, on warm models."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flowpp.replay import MOST_ROWS
from worker.batches import Batch, Lanes, next_batch
from worker.jobs import Job
from worker.lease import Lease
from worker.metrics import claimed
from worker.results import Results
from worker.service import Service
from worker.warm import WarmModels
from worker.work import WORK, Work

log = logging.getLogger(__name__)

LINGER_SECONDS = 1.0
"""For so long the worker looks for a next job before it waits for a bell, which may take kombu a second to hear."""

_LOOK_SECONDS = 0.005
"""From one look for jobs to the next, while a batch could begin."""

_LOOK_BESIDE_SECONDS = 0.01
"""The same beside a batch that is under way, which takes longer."""

_AWAKE_SECONDS = 2.0
_LARGES = 2


class Inference:
    """The inference worker: batches of whatever waits for the same model when they begin.

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
        until = time.monotonic()
        with self._round() as held:
            while True:
                stopping = self._shutdown.is_set()
                if held.lanes.free and not stopping:
                    held.begin(self._claim(held.works))
                busy = bool(held.works)
                if held.step(stopping, _LOOK_BESIDE_SECONDS) or busy:  # one step may see a whole batch
                    until = time.monotonic() + LINGER_SECONDS
                elif stopping:
                    return
                elif time.monotonic() < until:
                    time.sleep(_LOOK_SECONDS)
                elif self._service.jobs.sleep("inference", self._name):
                    return

    def answer(self, jobs: list[Job]) -> None:
        """Answers claimed jobs."""
        with self._round() as held:
            held.begin(jobs)
            while held.step(self._shutdown.is_set(), None):
                pass

    @contextmanager
    def _round(self) -> Iterator["_Held"]:
        service = self._service
        with (
            Lease(service.jobs, []) as lease,
            Results(service, lease) as results,
            Lanes(self._models, service.checkpoints, self._batch_size, lease) as lanes,
        ):
            # On a CPU no row of more would be computed faster.
            most_awaited = self._batch_size if self._models.device.type == "cuda" else MOST_ROWS
            yield _Held(service, lease, results, lanes, self._batch_size, most_awaited)

    def _claim(self, works: list[Work]) -> list[Job]:
        """Jobs that the next batch has room for."""
        larges = sum(work.size > self._batch_size for work in works)
        room = self._batch_size - sum(work.size for work in works if work.size <= self._batch_size)
        if room <= 0:
            return []
        jobs = self._service.jobs.claim(
            "inference",
            self._name,
            room,
            large=self._batch_size,
            larges=_LARGES - larges,
            awake_seconds=_AWAKE_SECONDS,
        )
        claimed(jobs)
        return jobs


class _Held:
    """The works that the worker holds, and the batches that they are computed in."""

    def __init__(
        self, service: Service, lease: Lease, results: Results, lanes: Lanes, batch_size: int, most_awaited: int
    ) -> None:
        self.works: list[Work] = []
        self.lanes = lanes
        self._service = service
        self._lease = lease
        self._results = results
        self._batch_size, self._most_awaited = batch_size, most_awaited

    def begin(self, jobs: list[Job]) -> None:
        """Holds claimed jobs; those whose images cannot be had fail."""
        for job in jobs:
            self._lease.hold(job)
        for job in jobs:
            try:
                self.works.append(WORK[job.type](self._service, job))
            except Exception as error:
                log.exception("job %s cannot begin", job.id, extra=job.subject)
                self._results.fail(job, error)

    def step(self, stopping: bool, look_seconds: float | None) -> bool:
        """Begins the batches that can begin and tells those that are done; whether there is more to do.

        A group that has had its turn is last. Waits for the next batch that is done, but no longer than to look for
        more jobs, where more can be begun.
        """
        self._stop_unwanted(all_of_them=stopping and not self.lanes.under_way)
        while self.lanes.free and not stopping:
            batch = next_batch(self.works, self._batch_size, self._most_awaited)
            if batch is None:
                break
            group = batch.works[0].job.group
            self.works = [work for work in self.works if work.job.group != group] + [
                work for work in self.works if work.job.group == group
            ]
            self.lanes.begin(batch)
        if self.lanes.under_way:
            for batch in self.lanes.finished(look_seconds if self.lanes.free and not stopping else None):
                self._tell(batch)
        self.works = [work for work in self.works if self._lease.holds(work.job) and not work.finished]
        return bool(self.works or self.lanes.under_way)

    def _tell(self, batch: Batch) -> None:
        """What came of a batch; nothing of jobs that were let go of meanwhile."""
        for work, error in batch.failed.items():
            if self._lease.holds(work.job):
                self._results.fail(work.job, error)
        computed = [work for work in batch.computed if self._lease.holds(work.job)]
        for work in computed:
            work.take(batch.computed[work])
        if computed and batch.model is not None:
            self._results.tell(computed, batch.model)

    def _stop_unwanted(self, all_of_them: bool) -> None:
        """Lets go of jobs that are to be cancelled, that were lost, or for which there is no time any more."""
        for job in [work.job for work in self.works if self._lease.holds(work.job)]:
            if self._lease.lost(job):
                self._lease.let_go(job)
                self._lease.ended(job, None)
                continue
            unwanted = all_of_them or self._lease.wish(job) != "running"
            if unwanted and self._results.end(job, "stopped") == "queued":
                self._service.bells.ring("inference", job.id)
        self.works = [work for work in self.works if self._lease.holds(work.job)]
