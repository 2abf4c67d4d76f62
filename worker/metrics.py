"""Prometheus metrics: what this process counts and measures, and what Redis knows, read when it is asked for.

Counters begin anew with each process, and each counts what it did itself: sum them over processes.
"""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis import Redis, RedisError

from worker.gpus import gpus
from worker.jobs import Job
from worker.overview import Overview, RunningTraining, overview

log = logging.getLogger(__name__)

Where = Literal["api", "workers", "both"]


class Family(NamedTuple):
    """A metric: its name, kind and labels, what it means, and who serves it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    where: Where


FAMILIES: list[Family] = []
"""All there are; docs/observability.md lists them."""

REGISTRY = CollectorRegistry()
"""What this process counts and measures."""

ProcessCollector(namespace="flowpp", registry=REGISTRY)  # CPU seconds, memory, open files: flowpp_process_...


def counter(name: str, labels: Sequence[str], meaning: str, where: Where) -> Counter:
    FAMILIES.append(Family(name, "counter", tuple(labels), meaning, where))
    return Counter(name, meaning, labels, registry=REGISTRY)


def gauge(name: str, labels: Sequence[str], meaning: str, where: Where) -> Gauge:
    FAMILIES.append(Family(name, "gauge", tuple(labels), meaning, where))
    return Gauge(name, meaning, labels, registry=REGISTRY)


def histogram(name: str, labels: Sequence[str], meaning: str, where: Where, buckets: Sequence[float]) -> Histogram:
    FAMILIES.append(Family(name, "histogram", tuple(labels), meaning, where))
    return Histogram(name, meaning, labels, registry=REGISTRY, buckets=buckets)


SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)
"""Buckets from a likelihood of one image to the training of a day."""

ATTEMPTS = histogram(
    "flowpp_attempt_duration_seconds",
    ["type", "outcome"],
    "Attempts at jobs, from the claim to the end, by what the job then was: succeeded, failed, cancelled, paused, "
    "queued (it is tried again), or lost (another worker has it, or it was deleted).",
    "workers",
    SECONDS,
)
QUEUE_WAIT = histogram(
    "flowpp_queue_wait_seconds",
    ["queue"],
    "From a job's submission to the claim of its first attempt.",
    "workers",
    SECONDS,
)
BATCH_IMAGES = histogram(
    "flowpp_batch_images",
    ["type"],
    "Images of a batch that the inference worker computed at once.",
    "workers",
    [2**power for power in range(11)],
)
BATCH_SECONDS = histogram(
    "flowpp_batch_duration_seconds",
    ["type"],
    "Time that such a batch took, with the loading of its model where that was not warm.",
    "workers",
    [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
)
IMAGES = counter(
    "flowpp_images_total",
    ["type"],
    "Images that were trained on, scored or sampled; their rate is images/s.",
    "workers",
)
LEASES_LOST = counter(
    "flowpp_leases_lost_total", ["type"], "Jobs that a worker held and that were not its own any more.", "workers"
)
WARM_MODELS = gauge(
    "flowpp_warm_model_bytes",
    ["checkpoint"],
    "A model that the inference worker holds loaded: parameters and recorded passes.",
    "workers",
)
REAPED = counter(
    "flowpp_reaper_actions_total",
    ["action"],
    "What the reaper has done: attempt_ended (its lease had run out), cancelled (Cancel-After), expired or deleted "
    "(jobs removed), bell_rung (for jobs that waited unheard), clock_moved (Redis's clock; leases are not trusted).",
    "both",
)


def claimed(jobs: Iterable[Job]) -> None:
    """Notes how long claimed jobs have waited."""
    for job in jobs:
        if job.attempt == 1 and job.started_at is not None:
            QUEUE_WAIT.labels(job.queue).observe(max(0.0, job.started_at - job.created_at))


Values = dict[str, list[tuple[tuple[str, ...], float]]]
"""Of gauges by name: the values of their labels, and the value."""


class Read(Collector):
    """Gauges that are read when they are asked for."""

    families: ClassVar[Sequence[Family]]

    @abstractmethod
    def read(self) -> Values: ...

    def collect(self) -> Iterator[Metric]:
        values = self.read()
        for family in self.families:
            metric = GaugeMetricFamily(family.name, family.meaning, labels=family.labels)
            for labels, value in values.get(family.name, ()):
                metric.add_metric(labels, value)
            yield metric


def _read(where: Where, gauges: Mapping[str, tuple[tuple[str, ...], str]]) -> list[Family]:
    found = [Family(name, "gauge", labels, meaning, where) for name, (labels, meaning) in gauges.items()]
    FAMILIES.extend(found)
    return found


class GpuMetrics(Read):
    """The GPUs of this machine."""

    families = _read(
        "workers",
        {
            "flowpp_gpu_memory_used_bytes": (("gpu",), "Memory of a GPU that is taken, by whatever process."),
            "flowpp_gpu_memory_total_bytes": (("gpu",), "Memory of a GPU."),
            "flowpp_gpu_utilization_ratio": (("gpu",), "Share of the last second or so in which a GPU computed."),
        },
    )

    def read(self) -> Values:
        found = gpus()
        return {
            "flowpp_gpu_memory_used_bytes": [((gpu.name,), gpu.used_bytes) for gpu in found],
            "flowpp_gpu_memory_total_bytes": [((gpu.name,), gpu.total_bytes) for gpu in found],
            "flowpp_gpu_utilization_ratio": [
                ((gpu.name,), gpu.utilization) for gpu in found if gpu.utilization is not None
            ],
        }


_TRAINING = {
    "flowpp_training_step": "Optimizer steps that a training job has taken.",
    "flowpp_training_steps": "Optimizer steps that it shall take.",
    "flowpp_training_bits_per_dim": "Its training loss.",
    "flowpp_training_validation_bits_per_dim": "Its last validation.",
    "flowpp_training_images_per_second": "Its pace.",
    "flowpp_training_checkpoint_age_seconds": "Since its newest checkpoint was stored.",
}


class ServiceMetrics(Read):
    """What Redis knows of the whole service."""

    families = _read(
        "api",
        {
            "flowpp_redis_up": ((), "1 where Redis answers; else 0, and the other gauges of this table are not there."),
            "flowpp_workers": (("queue",), "Workers that are there."),
            "flowpp_queue_jobs": (("queue",), "Jobs that wait."),
            "flowpp_queue_head_wait_seconds": (("queue",), "For so long the job whose turn is next has waited."),
            "flowpp_jobs": (("type", "status"), "Jobs that there are, finished ones until they are deleted."),
            **{name: (("job",), f"{meaning} Of jobs that a worker holds.") for name, meaning in _TRAINING.items()},
        },
    )

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def read(self) -> Values:
        try:
            found = overview(self._redis)
        except RedisError as error:
            log.warning("no metrics of the service until Redis tells them: %s", error)
            return {"flowpp_redis_up": [((), 0)]}
        values: Values = {
            "flowpp_redis_up": [((), 1)],
            "flowpp_workers": [((queue,), state.workers) for queue, state in found.queues.items()],
            "flowpp_queue_jobs": [((queue,), state.waiting) for queue, state in found.queues.items()],
            "flowpp_queue_head_wait_seconds": [((queue,), state.wait_seconds) for queue, state in found.queues.items()],
            "flowpp_jobs": [
                ((kind, status), count) for kind, counts in found.jobs.items() for status, count in counts.items()
            ],
        }
        for job in found.training:
            for name, value in zip(_TRAINING, _told(found, job), strict=True):
                if value is not None:
                    values.setdefault(name, []).append(((job.id,), value))
        return values


def _told(found: Overview, job: RunningTraining) -> tuple[float | None, ...]:
    """In the order of `_TRAINING`."""
    return (
        job.progress.step if job.progress else None,
        job.progress.total_steps if job.progress else None,
        job.train_bits_per_dim,
        job.validation_bits_per_dim,
        job.images_per_second,
        None if job.checkpoint_at is None else max(0.0, found.at - job.checkpoint_at),
    )


def together(*collectors: Collector) -> CollectorRegistry:
    """This process's own metrics, with others."""
    registry = CollectorRegistry()
    for each in (REGISTRY, *collectors):
        registry.register(each)
    return registry


@contextmanager
def serving(port: int, registry: CollectorRegistry) -> Iterator[None]:
    """Answers `GET /metrics` on a port of all addresses while the block runs, without a key; 0 is none.

    Raises `OSError`, whose message names the port.
    """
    if not port:
        yield
        return
    try:
        server, thread = start_http_server(port, registry=registry)
    except OSError as error:
        raise OSError(error.errno, f"FLOWPP_METRICS_PORT={port} cannot be used: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
