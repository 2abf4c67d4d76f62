"""What the tests of the worker's room share: a Redis server, and services over it, each with a store of its own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowpp.data import build_image_set
from tests.s3 import S3, running_s3
from worker.datasets import Dataset
from worker.jobs import Job, NewJob, new_job_id
from worker.redis_server import RedisServer
from worker.service import Service
from worker.settings import Settings


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


@pytest.fixture
def settings(redis_server: RedisServer, tmp_path: Path) -> Settings:
    return Settings(redis_url=redis_server.url, data_directory=tmp_path / "data", lease_seconds=0.5, max_attempts=2)


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    """Over an empty Redis server."""
    with Service(settings) as service:
        service.redis.flushall()
        yield service


@pytest.fixture
def dataset(service: Service, tmp_path: Path) -> Dataset:
    """40 images of 8 x 8, 4 of them for validation."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    return service.datasets.register(build_image_set(tmp_path / "images.npy", tmp_path / "image_set"), "images.npy")


class Submit:
    """Queues a job of a type, which uses nothing but what is said."""

    def __init__(self, service: Service) -> None:
        self._jobs = service.jobs

    def __call__(
        self,
        type: str = "training",
        *,
        uses: tuple[str, ...] = (),
        group: str = "",
        size: int = 1,
        metadata: dict[str, str] | None = None,
        max_queued: int = 1_000,
        owner: str = "local",
        max_jobs: int = 1_000,
        total_steps: int | None = None,
        cancel_after: int | None = None,
    ) -> Job:
        new = NewJob(new_job_id(), type, {"of": "this test"}, {}, metadata or {}, uses, group, size, owner)
        new = replace(new, total_steps=total_steps, cancel_after=cancel_after)
        return self._jobs.submit(new, max_queued, max_jobs)[0]


@pytest.fixture
def submit(service: Service) -> Submit:
    return Submit(service)
