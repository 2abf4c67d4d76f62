"""Inference workers that are killed while they answer: no request is lost, and none is answered twice."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flowpp import FlowPP
from flowpp.likelihood import likelihood
from flowpp.presets import resolve_model
from tests.waiting import LEASE_SECONDS, PATIENCE_SECONDS, until
from worker import child, presence
from worker.jobs import TERMINAL
from worker.redis_server import RedisServer
from worker.requests import LikelihoodRequest
from worker.service import Service
from worker.settings import Settings
from worker.submission import prepare_likelihood, submit_one


class Workers:
    """Two inference workers over a service, one of which can be killed at a time."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        self._directory = directory
        self._started = 0
        self._environment = {
            **os.environ,
            "FLOWPP_REDIS_URL": settings.redis_url,
            "FLOWPP_DATA_DIRECTORY": str(settings.data_directory),
            "FLOWPP_LEASE_SECONDS": str(LEASE_SECONDS),
            "FLOWPP_MAX_ATTEMPTS": "20",
            "FLOWPP_BATCH_SIZE": "4",
            "OMP_NUM_THREADS": "1",
        }
        self.processes: list[subprocess.Popen[bytes]] = [self._start(), self._start()]

    def _start(self) -> subprocess.Popen[bytes]:
        self._started += 1
        log = self._directory / f"worker-{self._started}.log"
        return child.start([sys.executable, "-m", "worker", "inference"], log, self._environment)

    def kill_one(self, service: Service) -> bool:
        """SIGKILL to one that holds a request, and starts another. False if neither holds one at the moment."""
        for job in service.jobs.page(status="running").data:
            [*_, claimed] = [event for event in service.events.page(job.id).data if "worker" in event.data]
            for index, process in enumerate(self.processes):
                if claimed.data["worker"].endswith(f"-{process.pid}"):
                    process.send_signal(signal.SIGSTOP)
                    if held := service.jobs.get(job.id) == job:
                        process.kill()
                        process.wait()
                        self.processes[index] = self._start()
                    else:  # it had just been answered
                        process.send_signal(signal.SIGCONT)
                    return held
        return False

    def stop(self) -> None:
        for process in self.processes:
            child.stop(process, PATIENCE_SECONDS)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with RedisServer(tmp_path / "redis") as server:
        settings = Settings(
            redis_url=server.url, data_directory=tmp_path / "data", lease_seconds=LEASE_SECONDS, max_attempts=20
        )
        with Service(settings) as service:
            yield service


@pytest.mark.parametrize(("requests", "kills"), [(60, 2), pytest.param(120, 4, marks=pytest.mark.faults)])
def test_killed_inference_workers_lose_no_request_and_answer_none_twice(
    service: Service, tmp_path: Path, requests: int, kills: int
) -> None:
    import torch

    model = FlowPP(resolve_model("tiny", {}, (3, 8, 8)))
    model.initialize(torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8))
    model.save(tmp_path / "model")
    checkpoint = service.checkpoints.register(tmp_path / "model")
    workers = Workers(service.settings, tmp_path)
    try:
        until(lambda: presence.count(service.redis, "inference") == 2, "no workers")
        images = np.random.default_rng(0).integers(0, 256, (requests, 1, 8, 8, 3), np.uint8)
        jobs = [
            submit_one(
                service,
                prepare_likelihood(service, LikelihoodRequest(model=checkpoint.id, importance_samples=512), each),
            )
            for each in images
        ]
        for kill in range(1, kills + 1):
            least = requests * kill // (kills + 2)
            until(lambda least=least: sum(service.jobs.get(job.id).finished for job in jobs) >= least)
            until(lambda: workers.kill_one(service), "no worker holds a request")
        until(
            lambda: all(service.jobs.get(job.id).finished for job in jobs),
            lambda: child.tail(tmp_path / "worker-1.log"),
        )
    finally:
        workers.stop()
    attempts = 0
    for job, image in zip(jobs, images, strict=True):
        after = service.jobs.get(job.id)
        assert (after.status, after.error) == ("succeeded", None)
        assert after.result is not None
        events = service.events.page(job.id).data
        assert [event.data["status"] for event in events if event.data["status"] in TERMINAL] == ["succeeded"]
        attempts += after.attempt
        if after.attempt > 1:
            [expected] = likelihood(model, image, importance_samples=512)
            np.testing.assert_allclose(after.result["log_likelihood"], expected[0, 0], rtol=1e-5)
    assert attempts > requests, "no kill struck a worker at work"
    assert not service.redis.zcard("flowpp:leases")
