"""A worker's hold on its jobs: a thread renews the leases, and hears what is wished of the jobs meanwhile.

Each attempt is a span from when it is held to when it has ended.
"""

import logging
import threading
import time
from collections.abc import Iterable
from typing import Self

from flowpp.tracing import NOTHING, Span, begin, wanted
from worker.connection import UNREACHABLE
from worker.jobs import Job, Jobs, JobStatus
from worker.metrics import ATTEMPTS, LEASES_LOST

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_RENEWALS = 3  # a lease


class Lease:
    """Holds jobs while the block runs. `lost` says which of them another attempt has, or nobody."""

    def __init__(self, jobs: Jobs, held: Iterable[Job]) -> None:
        self._jobs = jobs
        self._wishes: dict[str, JobStatus | None] = {}
        self._held: dict[str, Job] = {}
        self._since: dict[str, float] = {}
        self._spans: dict[str, tuple[int, Span]] = {}  # of the attempt of that number
        self._changing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        for job in held:
            self.hold(job)

    def wish(self, job: Job) -> JobStatus | None:
        """What is wished of the job: running, pausing or cancelling; none where the attempt has lost it."""
        return self._wishes.get(job.id, "running")

    def lost(self, job: Job) -> bool:
        """Whether the job is not this attempt's any more, which must then not write."""
        return self.wish(job) is None

    def holds(self, job: Job) -> bool:
        """Whether this attempt has not been let go of, nor the job held in another."""
        held = self._held.get(job.id)
        return held is not None and held.attempt == job.attempt

    def hold(self, job: Job) -> None:
        """Holds one more, of whose earlier attempts nothing counts."""
        with self._changing:
            self._wishes.pop(job.id, None)
            self._held[job.id] = job
            self._since[job.id] = time.monotonic()
            if job.id in self._spans:  # its loss was not heard of yet
                self._end_span(job.id, self._spans[job.id][0], None)
            self._spans[job.id] = (job.attempt, _span(job))

    def let_go(self, job: Job) -> None:
        """Of a job that has ended; another attempt of it stays."""
        with self._changing:
            if self.holds(job):
                self._held.pop(job.id)
                self._wishes.pop(job.id, None)

    def ended(self, job: Job, status: JobStatus | None) -> None:
        """Counts an attempt that has ended, by what the job then is; none: it was lost."""
        began = self._since.pop(job.id, None)
        if began is not None:
            ATTEMPTS.labels(job.type, status or "lost").observe(time.monotonic() - began)
        with self._changing:
            self._end_span(job.id, job.attempt, status)

    def traceparent(self, job: Job) -> str:
        """Of the attempt's span, or of what asked for the job, where the attempt has ended or is not seen in traces."""
        held = self._spans.get(job.id)
        return (held[1].traceparent if held and held[0] == job.attempt else "") or job.traceparent

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for job_id, held in list(self._spans.items()):  # attempts that were not told to the end
            self._end_span(job_id, held[0], None)

    def _end_span(self, job_id: str, attempt: int, status: JobStatus | None) -> None:
        if job_id in self._spans and self._spans[job_id][0] == attempt:
            _, span = self._spans.pop(job_id)
            span.note({"flowpp.job.outcome": status or "lost"})
            span.end(failed=status in (None, "failed"))

    def _renew(self) -> None:
        looks = max(1, int(self._jobs.lease_seconds / _RENEWALS / _LOOK_SECONDS))
        pause = min(_LOOK_SECONDS, self._jobs.lease_seconds / _RENEWALS)
        look = 0
        while not self._ended.wait(pause):
            look += 1
            held = list(self._held.values())
            try:
                wishes = self._jobs.wishes(held, renew=look >= looks)
            except UNREACHABLE as error:  # nobody else can have the jobs then
                log.warning("the leases of %d jobs were not renewed: %s", len(held), error)
                look = looks  # they may have run out, so they are renewed as soon as that is possible
            else:
                look %= looks
                for job, wish in zip(held, wishes, strict=True):
                    self._hear(job, wish)

    def _hear(self, job: Job, wish: JobStatus | None) -> None:
        with self._changing:
            if self._held.get(job.id) is job:  # not let go of, nor held in a later attempt, since it was asked for
                if wish is None and not self.lost(job):
                    LEASES_LOST.labels(job.type).inc()
                self._wishes[job.id] = wish


def _span(job: Job) -> Span:
    if not wanted():
        return NOTHING
    attributes: dict[str, str | int | float] = {
        "flowpp.job.id": job.id,
        "flowpp.job.type": job.type,
        "flowpp.job.attempt": job.attempt,
        "flowpp.request_id": job.request_id,
    }
    if job.attempt == 1 and job.started_at is not None:
        attributes["flowpp.job.queue_seconds"] = max(0.0, job.started_at - job.created_at)
    return begin(f"{job.type} attempt", "consumer", parent=job.traceparent, attributes=attributes)
