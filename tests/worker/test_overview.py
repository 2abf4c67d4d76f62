"""The service at a moment, and the metrics that are made of it."""

import os
import stat
import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import until
from tests.worker.conftest import Submit
from worker.jobs import Progress
from worker.metrics import GpuMetrics, ServiceMetrics, together
from worker.overview import overview
from worker.presence import Offer, Presence
from worker.service import Service

METRICS = {"step": 5, "images_seen": 40, "train_bits_per_dim": 6.5, "images_per_second": 80.0}


def samples(*collectors: GpuMetrics | ServiceMetrics) -> dict[tuple[str, ...], float]:
    """Values by name and labels, as Prometheus reads them."""
    text = generate_latest(together(*collectors)).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def counted(service: Service) -> dict[str, dict[str, int]]:
    """Jobs by type and status, where there are any."""
    found = {kind: {status: n for status, n in counts.items() if n} for kind, counts in counts_of(service).items()}
    return {kind: counts for kind, counts in found.items() if counts}


def counts_of(service: Service) -> dict[str, dict[str, int]]:
    return {str(kind): {str(s): n for s, n in counts.items()} for kind, counts in overview(service.redis).jobs.items()}


def test_jobs_are_counted_by_type_and_status_through_their_lives(service: Service, submit: Submit) -> None:
    first, second, other = submit(total_steps=10), submit(), submit("sampling")
    assert counted(service) == {"training": {"queued": 2}, "sampling": {"queued": 1}}
    (held,) = service.jobs.claim("training", "a worker")
    service.jobs.pause(first.id)
    assert counted(service)["training"] == {"pausing": 1, "queued": 1}
    service.jobs.end(held, "stopped")
    service.jobs.cancel(second.id)
    assert counted(service)["training"] == {"paused": 1, "cancelled": 1}
    service.jobs.delete(second.id), service.jobs.delete(first.id), service.jobs.delete(other.id)
    assert counted(service) == {}


def test_an_owner_is_told_of_its_own_jobs(service: Service, submit: Submit) -> None:
    submit(owner="alice")
    service.jobs.claim("training", "a worker")
    submit(owner="bob"), submit("sampling", owner="bob")
    alices = overview(service.redis, "alice")
    assert (sum(alices.jobs["training"].values()), alices.jobs["training"]["running"]) == (1, 1)
    assert (sum(alices.jobs["sampling"].values()), len(alices.training)) == (0, 1)
    bobs = overview(service.redis, "bob")
    assert overview(service.redis).jobs["training"]["queued"] == bobs.jobs["training"]["queued"] == 1
    assert bobs.training == overview(service.redis, "nobody").training == []


def test_a_queue_tells_how_many_wait_and_how_long_the_next_one_has(service: Service, submit: Submit) -> None:
    began = time.monotonic()
    job, _ = submit(), submit()
    service.redis.hset(
        f"flowpp:job:{job.id}", "changed", int(service.redis.hget(f"flowpp:job:{job.id}", "changed")) - 10**7
    )
    with Presence(service.redis, "training", "a worker", Offer(bytes=1, shared=True)):
        until(lambda: overview(service.redis).queues["training"].workers)
        queue = overview(service.redis).queues["training"]
    assert (queue.waiting, queue.workers) == (2, 1)
    assert 10 <= queue.wait_seconds <= 10 + time.monotonic() - began
    assert overview(service.redis).queues["inference"].wait_seconds == 0


def test_a_running_training_is_told_of_until_it_ends(service: Service, submit: Submit) -> None:
    submit(total_steps=10)
    (job,) = service.jobs.claim("training", "a worker")
    assert overview(service.redis).training[0].train_bits_per_dim is None
    service.events.append(job, "metrics", METRICS | {"validation_bits_per_dim": 7.5})
    service.events.append(job, "metrics", METRICS | {"step": 6})
    began = time.monotonic()
    service.events.append(job, "checkpoint", {"id": "ckpt_1", "step": 5, "metrics": {}})
    service.jobs.set_progress(job, Progress.at(6, 10))
    told = samples(ServiceMetrics(service.redis))
    names = ("step", "steps", "bits_per_dim", "validation_bits_per_dim", "images_per_second")
    assert [told[f"flowpp_training_{name}", job.id] for name in names] == [6, 10, 6.5, 7.5, 80]
    assert 0 <= told["flowpp_training_checkpoint_age_seconds", job.id] <= time.monotonic() - began
    assert told["flowpp_jobs", "running", "training"] == 1 or told["flowpp_jobs", "training", "running"] == 1
    service.jobs.end(job, "succeeded")
    assert not [key for key in samples(ServiceMetrics(service.redis)) if job.id in key]


def test_what_is_read_does_not_grow_with_the_jobs_that_there_have_been(service: Service, submit: Submit) -> None:
    def commands() -> int:
        before = service.redis.info("stats")["total_commands_processed"]
        overview(service.redis)
        return service.redis.info("stats")["total_commands_processed"] - before

    submit()
    overview(service.redis)
    few = commands()
    for _ in range(50):
        service.jobs.cancel(submit("sampling").id)
    assert commands() == few


def test_without_redis_its_metrics_say_that_it_is_away(service: Service) -> None:
    with Service(service.settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"}), 0) as lost:
        told = samples(ServiceMetrics(lost.redis))
    assert told["flowpp_redis_up",] == 0
    assert not [name for name, *_ in told if name.startswith("flowpp_jobs")]


def test_gpus_are_told_of_as_the_drivers_tool_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "0, 1024, 81559, 37"\necho "1, 2, 81559, [N/A]"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    told = {key: value for key, value in samples(GpuMetrics()).items() if key[0].startswith("flowpp_gpu")}
    assert told == {
        ("flowpp_gpu_memory_used_bytes", "0"): 1024 * 2**20,
        ("flowpp_gpu_memory_used_bytes", "1"): 2 * 2**20,
        ("flowpp_gpu_memory_total_bytes", "0"): 81559 * 2**20,
        ("flowpp_gpu_memory_total_bytes", "1"): 81559 * 2**20,
        ("flowpp_gpu_utilization_ratio", "0"): 0.37,
    }


def test_a_driver_that_fails_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert not [key for key in samples(GpuMetrics()) if key[0].startswith("flowpp_gpu")]
