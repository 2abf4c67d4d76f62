"""What a worker counts and measures, by its own registry."""

import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from flowpp import FlowPP
from flowpp.likelihood import estimate
from flowpp.presets import resolve_model
from tests.waiting import until
from tests.worker.conftest import Submit
from worker.inference import Inference
from worker.lease import Lease
from worker.metrics import REGISTRY, serving
from worker.models import Checkpoint
from worker.reaper import reap
from worker.redis_server import free_port
from worker.requests import LikelihoodRequest
from worker.service import Service
from worker.settings import Settings
from worker.submission import prepare_likelihood, submit_one
from worker.warm import WarmModels


class Counted:
    """How much a sample has grown since."""

    def __init__(self, name: str, **labels: str) -> None:
        self._of = name, labels
        self._before = self.now

    @property
    def now(self) -> float:
        return REGISTRY.get_sample_value(*self._of) or 0

    @property
    def more(self) -> float:
        return self.now - self._before


@pytest.fixture
def checkpoints(service: Service, tmp_path: Path) -> list[Checkpoint]:
    FlowPP(resolve_model("tiny", {}, (3, 8, 8))).save(tmp_path / "model")
    return [service.checkpoints.register(tmp_path / "model") for _ in range(2)]


def score(service: Service, checkpoint: Checkpoint, images: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), np.uint8)
    submit_one(service, prepare_likelihood(service, LikelihoodRequest(model=checkpoint.id), pixels))


def test_answered_jobs_are_counted_with_their_images_batches_and_waits(
    service: Service, checkpoints: list[Checkpoint]
) -> None:
    ended = Counted("flowpp_attempt_duration_seconds_count", type="likelihood", outcome="succeeded")
    images = Counted("flowpp_images_total", type="likelihood")
    batches = Counted("flowpp_batch_images_count", type="likelihood")
    large = Counted("flowpp_batch_images_bucket", type="likelihood", le="8.0")
    seconds = Counted("flowpp_batch_duration_seconds_sum", type="likelihood")
    waits = Counted("flowpp_queue_wait_seconds_count", queue="inference")
    for count in (1, 2, 3):
        score(service, checkpoints[0], count)
    began = time.monotonic()
    Inference(service, "a worker", threading.Event()).drain()
    assert (ended.more, images.more, batches.more, large.more, waits.more) == (3, 6, 1, 1, 3)
    assert 0 < seconds.more <= time.monotonic() - began


def test_a_job_that_cannot_be_computed_counts_as_failed(service: Service, checkpoints: list[Checkpoint]) -> None:
    failed = Counted("flowpp_attempt_duration_seconds_count", type="likelihood", outcome="failed")
    score(service, checkpoints[0], 1)
    service.store.delete(checkpoints[0].prefix)
    Inference(service, "a worker", threading.Event()).drain()
    assert failed.more == 1


def test_warm_models_are_told_with_their_bytes_until_they_give_way(
    service: Service, checkpoints: list[Checkpoint]
) -> None:
    first, second = (Counted("flowpp_warm_model_bytes", checkpoint=each.id) for each in checkpoints)
    models = WarmModels(service.checkpoints, capacity=1)
    size = sum(tensor.nbytes for tensor in models.get(checkpoints[0]).state_dict().values())
    assert (first.now, second.now) == (size, 0)
    models.get(checkpoints[1])
    assert (first.now, second.now) == (0, size)
    model = models.get(checkpoints[1])
    estimate(model, np.zeros((2, 8, 8, 3), np.uint8), [1, 2])
    models.get(checkpoints[1])
    assert model.replays is not None
    assert second.now == model.replays.nbytes > size  # with what its recorded passes hold


def test_a_lease_that_is_lost_is_counted_once(service: Service, submit: Submit) -> None:
    submit()
    lost = Counted("flowpp_leases_lost_total", type="training")
    (job,) = service.jobs.claim("training", "a worker")
    with Lease(service.jobs, [job]) as lease:
        service.jobs.end(job, "crashed")
        until(lambda: lease.lost(job))
        threading.Event().wait(0.5)
    assert lost.more == 1


def test_what_the_reaper_does_is_counted(settings: Settings, submit: Submit) -> None:
    with Service(settings.model_copy(update={"lease_seconds": 1e-3})) as service:
        rung, ended, cancelled, expired = (
            Counted("flowpp_reaper_actions_total", action=action)
            for action in ("bell_rung", "attempt_ended", "cancelled", "expired")
        )
        submit("sampling"), submit("sampling", cancel_after=60)
        late = service.jobs.page().data[0]
        service.redis.zadd("flowpp:deadlines", {late.id: 1})
        service.jobs.cancel(submit("sampling").id)
        service.redis.zadd("flowpp:expiring", {service.jobs.page().data[0].id: 1})
        submit()
        service.jobs.claim("training", "a worker")
        while not ended.more:
            reap(service)
    assert (cancelled.more, expired.more, ended.more) == (1, 1, 1)
    assert rung.more >= 1


def test_a_port_answers_metrics_while_it_is_asked_to_and_a_taken_one_is_named() -> None:
    port = free_port()
    with serving(port, REGISTRY):
        answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
        assert "flowpp_process_resident_memory_bytes" in answer.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"FLOWPP_METRICS_PORT={port} cannot be used"), serving(port, REGISTRY):
            pass


def test_without_a_port_nothing_is_served() -> None:
    before = threading.active_count()
    with serving(0, REGISTRY):
        assert threading.active_count() == before
