"""`flowpp status`."""

from collections.abc import Iterator

import typer

from api.client import ProblemError, QueueState, Readiness, RunningTraining, Status
from api.client.transport import LOCAL
from api.commands.options import AsJson, Key, Url
from api.commands.output import FAILURE, print_json, print_table, service_at, when

_LATER = 503
"""HTTP status while Redis cannot be reached."""


def status(as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Print the state of the service, its queues and its jobs. Exits with 1 if the service is not ready.

    The jobs are those of the key's owner. With the scope admin, or without authentication, they are everybody's.
    """
    with service_at(url, key, max_retries=0) as client:  # the state now, not after a wait
        ready, found = client.readiness(), None
        try:
            found = client.status()
        except ProblemError as error:
            if error.status != _LATER:
                raise
        if as_json:
            now = {} if found is None else found.model_dump(exclude={"object"})
            print_json({"url": client.url, **ready.model_dump(), **now})
        else:
            print_table((), _lines(client.url, ready, found))
    if ready.missing:
        raise typer.Exit(FAILURE)


def _lines(url: str, ready: Readiness, found: Status | None) -> Iterator[tuple[str, str]]:
    yield "service", f"{url} is {'not ready' if ready.missing else 'ready'}"
    for name, said in ready.checks.items():
        if found is None or name not in found.queues:
            yield name, said
        else:
            yield f"{name} queue", _queue(found.queues[name])
    if found is None:
        return
    for kind, counts in found.jobs.items():
        known = [f"{count:,} {status}" for status, count in counts.items() if count]
        yield f"{kind} jobs", ", ".join(known) or "none"
    for job in found.training:
        yield job.id, ", ".join(_training(job, found.at))


def _queue(queue: QueueState) -> str:
    workers = {0: "no worker", 1: "1 worker"}.get(queue.workers, f"{queue.workers} workers")
    if not queue.waiting:
        return f"{workers}, nothing waits"
    return f"{workers}, {queue.waiting:,} waiting, the next one for {queue.wait_seconds:.0f} s"


def _training(job: RunningTraining, now: float) -> Iterator[str]:
    yield job.status
    if progress := job.progress:
        yield f"{progress.percent_done:.0f} % of {progress.total_steps:,} steps"
    if job.train_bits_per_dim is not None:
        yield f"{job.train_bits_per_dim:.3f} bits/dim"
    if job.validation_bits_per_dim is not None:
        yield f"validation {job.validation_bits_per_dim:.3f}"
    if job.images_per_second is not None:
        yield f"{job.images_per_second:.0f} images/s"
    if job.checkpoint_at is not None:
        yield f"checkpoint {max(0, now - job.checkpoint_at):.0f} s ago"
    if progress and progress.estimated_finish_at is not None:
        yield f"done about {when(progress.estimated_finish_at)}"
