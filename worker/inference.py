"""The task that answers likelihood and sampling requests: in batches, on warm models."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowpp.model import FlowPP
from worker.jobs import Job
from worker.lease import Lease
from worker.results import Results
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
        with Lease(self._service.jobs, []) as lease, Results(self._service, lease) as results:
            while works or not self._shutdown.is_set():
                if not self._shutdown.is_set():
                    works += self._begun(self._claim(works), lease, results)
                if works:
                    works = self._step(works, lease, results)
                    until = time.monotonic() + LINGER_SECONDS
                elif time.monotonic() < until:
                    time.sleep(_LOOK_SECONDS)
                elif self._service.jobs.sleep("inference", self._name):
                    return

    def answer(self, jobs: list[Job]) -> None:
        """Answers claimed jobs."""
        with Lease(self._service.jobs, []) as lease, Results(self._service, lease) as results:
            works = self._begun(jobs, lease, results)
            while works:
                works = self._step(works, lease, results)

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

    def _begun(self, jobs: list[Job], lease: Lease, results: Results) -> list[Work]:
        """What claimed jobs compute; those whose images cannot be had fail."""
        works = []
        for job in jobs:
            lease.hold(job)
        for job in jobs:
            try:
                works.append(WORK[job.type](self._service, job))
            except Exception as error:
                log.exception("job %s cannot begin", job.id)
                results.fail(job, error)
        return works

    def _step(self, works: list[Work], lease: Lease, results: Results) -> list[Work]:
        """One batch, for the group that has waited longest; what is left to do, that group last."""
        self._stop_unwanted(works, lease, results)
        works = [work for work in works if lease.holds(work.job)]
        if not works:
            return []
        mine = [work for work in works if work.job.group == works[0].job.group]
        others = [work for work in works if work.job.group != works[0].job.group]
        self._compute(mine, lease, results)
        return others + [work for work in mine if work.left and lease.holds(work.job)]

    def _compute(self, works: list[Work], lease: Lease, results: Results) -> None:
        """A batch of works of one group, or one of each of them, where together they fail."""
        try:
            computed, model = self._batch(works)
        except Exception as error:
            log.exception("a batch of %d jobs failed", len(works))
            if len(works) == 1:
                results.fail(works[0].job, error)
            else:
                for work in works:
                    if lease.holds(work.job):
                        self._compute([work], lease, results)
        else:
            results.tell(computed, model)

    def _batch(self, works: list[Work]) -> tuple[list[Work], FlowPP]:
        """Computes rows of works of one group; those that have got some, and the model."""
        model = self._model(works)
        kind = WORK[works[0].job.type]
        rows = _shares(works, max(1, self._batch_size // _samples(works[0])))
        for work, _ in rows:
            if not work.rows:
                work.pace.at(0)
        with _threads(few=all(_size(work) <= self._batch_size for work in works)):
            computed = kind.compute(model, rows, self._batch_size)
        for (work, _), row in zip(rows, computed, strict=True):
            work.rows.append(row)
        return list(dict.fromkeys(work for work, _ in rows)), model

    def _model(self, works: list[Work]) -> FlowPP:
        """The works' model, loaded where it was not; what that took is in their results."""
        checkpoint = self._service.checkpoints.get(works[0].job.plan["checkpoint"])
        cold, started = checkpoint.id not in self._models, time.monotonic()
        model = self._models.get(checkpoint)
        for work in works if cold else ():
            work.cold_start_seconds = round(time.monotonic() - started, 3)
        return model

    def _stop_unwanted(self, works: list[Work], lease: Lease, results: Results) -> None:
        """Lets go of jobs that are to be cancelled, that were lost, or for which there is no time any more."""
        for job in [work.job for work in works if lease.holds(work.job)]:
            if lease.lost(job):
                lease.let_go(job)
                continue
            unwanted = self._shutdown.is_set() or lease.wish(job) != "running"
            if unwanted and results.end(job, "stopped") == "queued":
                self._service.bells.ring("inference", job.id)


@contextmanager
def _threads(few: bool) -> Iterator[None]:
    """Small requests leave half of the cores to those that receive and answer them: more would not make one faster."""
    every = torch.get_num_threads()
    if few:
        torch.set_num_threads(max(1, every // 2))
    try:
        yield
    finally:
        torch.set_num_threads(every)


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
