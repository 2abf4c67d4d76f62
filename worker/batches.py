"""Batches: rows of jobs of one group, computed together in one forward pass, and two such passes at a time."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from flowpp.model import FlowPP
from flowpp.tracing import Span, span
from worker.lease import Lease
from worker.metrics import BATCH_IMAGES, BATCH_SECONDS, IMAGES
from worker.models import Checkpoints
from worker.warm import WarmModels
from worker.work import WORK, Work

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Batch:
    """Rows (work, index) of works of one group; when it is computed, what came of each work's, and the model."""

    rows: list[tuple[Work, int]]
    computed: dict[Work, list[tuple[int, Any]]] = field(default_factory=dict)
    failed: dict[Work, Exception] = field(default_factory=dict)
    model: FlowPP | None = None

    @property
    def works(self) -> list[Work]:
        return list(dict.fromkeys(work for work, _ in self.rows))


def next_batch(works: Sequence[Work], batch_size: int, most_awaited: int) -> Batch | None:
    """The rows that are computed next, of the group that has waited longest; they are taken then.

    Up to `batch_size` of large works, and `most_awaited` where there is one of a batch at most, for which somebody may
    wait.
    """
    waiting = [work for work in works if work.left]
    mine = [work for work in waiting if work.job.group == waiting[0].job.group]
    if not mine:
        return None
    awaited = any(work.count * work.samples <= batch_size for work in mine)
    rows = _shares(mine, max(1, (min(batch_size, most_awaited) if awaited else batch_size) // mine[0].samples))
    for work, _ in rows:
        if not work.begun:
            work.pace.at(0)
        work.begun += 1
    return Batch(rows)


def _shares(works: Sequence[Work], length: int) -> list[tuple[Work, int]]:
    """Up to `length` rows, in turns of one from each work, that follow those that each has."""
    rows: list[tuple[Work, int]] = []
    for turn in range(length):
        for work in works:
            if turn < work.left and len(rows) < length:
                rows.append((work, work.begun + turn))
        if len(rows) == length:
            break
    return rows


class Lanes:
    """Where batches are computed: two at a time, each on half of the cores; on a GPU, one. A context manager.

    Threads that compute one batch wait for one another, and badly where others need the cores, too; two batches do not.
    """

    def __init__(self, models: WarmModels, checkpoints: Checkpoints, batch_size: int, lease: Lease) -> None:
        self._models = models
        self._checkpoints = checkpoints
        self._batch_size = batch_size
        self._lease = lease
        self._most = 1 if models.device.type == "cuda" else 2
        threads = max(1, torch.get_num_threads() // self._most)
        self._threads = ThreadPoolExecutor(self._most, "batch", initializer=torch.set_num_threads, initargs=(threads,))
        self._under_way: dict[Future[None], Batch] = {}

    @property
    def under_way(self) -> list[Batch]:
        return list(self._under_way.values())

    @property
    def free(self) -> bool:
        return len(self._under_way) < self._most

    def begin(self, batch: Batch) -> None:
        self._under_way[self._threads.submit(self._compute, batch)] = batch

    def finished(self, seconds: float | None) -> list[Batch]:
        """Those that have been computed, as soon as one has, or none after so long."""
        done, _ = wait(self._under_way, seconds, FIRST_COMPLETED)
        for future in done:
            future.result()  # which has dealt with what a batch can raise
        return [self._under_way.pop(future) for future in done]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def _compute(self, batch: Batch) -> None:
        """All works together, or one after the other, where together they fail."""
        works = batch.works
        try:
            self._compute_rows(batch, batch.rows)
        except Exception as error:
            alone = works[0].job.subject if len(works) == 1 else None
            log.exception("a batch of %d jobs failed", len(works), extra=alone)
            if len(works) == 1:
                batch.failed[works[0]] = error
                return
            for work in works:
                try:
                    self._compute_rows(batch, [row for row in batch.rows if row[0] is work])
                except Exception as error:
                    log.exception("job %s cannot be computed", work.job.id, extra=work.job.subject)
                    batch.failed[work] = error

    def _compute_rows(self, batch: Batch, rows: list[tuple[Work, int]]) -> None:
        works = list(dict.fromkeys(work for work, _ in rows))
        kind, began = works[0].job.type, time.monotonic()
        with self._span(works, len(rows)):
            batch.model = self._model(works)
            results = WORK[kind].compute(batch.model, rows, self._batch_size)
        BATCH_SECONDS.labels(kind).observe(time.monotonic() - began)
        BATCH_IMAGES.labels(kind).observe(len(rows))
        IMAGES.labels(kind).inc(len(rows))
        for (work, index), row in zip(rows, results, strict=True):
            batch.computed.setdefault(work, []).append((index, row))

    def _span(self, works: list[Work], images: int) -> AbstractContextManager[Span]:
        """Belongs to the first work's attempt, and is linked to those of the others."""
        first, *others = [self._lease.traceparent(work.job) for work in works]
        attributes = {
            "flowpp.job.type": works[0].job.type,
            "flowpp.checkpoint.id": works[0].job.plan["checkpoint"],
            "flowpp.batch.images": images,
            "flowpp.batch.jobs": len(works),
        }
        return span("batch", parent=first, links=others, attributes=attributes)

    def _model(self, works: list[Work]) -> FlowPP:
        """The works' model, loaded where it was not; what that took is in their results."""
        checkpoint = self._checkpoints.resolve(works[0].job.plan["checkpoint"])  # which its jobs keep from deletion
        cold, started = checkpoint.id not in self._models, time.monotonic()
        model = self._models.get(checkpoint)
        for work in works if cold else ():
            work.cold_start_seconds = round(time.monotonic() - started, 3)
        return model
