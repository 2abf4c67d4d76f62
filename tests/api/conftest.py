"""What the tests of the API's room share: a running stack, an API without workers, and photographs to send."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn

from api.app import create_app
from api.client import Client, Job
from api.stack import Stack
from examples import photographs
from flowpp import FlowPP
from tests.api.served import finish_all, populate
from tests.waiting import PATIENCE_SECONDS, until
from worker.models import Checkpoint
from worker.redis_server import HOST, RedisServer, free_port
from worker.service import Service
from worker.settings import Settings


@pytest.fixture(scope="session")
def metrics_port() -> int:
    """Of the training worker of the stack; that of the inference worker is the next one."""
    while True:
        port = free_port()
        with suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, metrics_port: int) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("stack"), port=0)
    with pytest.MonkeyPatch.context() as environment:  # of its processes, not of others'
        environment.setenv("FLOWPP_METRICS_PORT", str(metrics_port))
        stack.start()
    try:
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url) as client:
        yield client


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """uint8 [48, 32, 32, 3]."""
    return photographs.patches()[0][:48]


@pytest.fixture(scope="session")
def archive(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of 32 training and 16 validation images."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, train=images[:32], validation=images[32:])
    return path


@pytest.fixture(scope="session")
def trained(client: Client, archive: Path) -> Job:
    """A `tiny` model after its 20 steps."""
    dataset = client.datasets.upload(archive)
    job = client.training_jobs.create(dataset=dataset.id, model={"preset": "tiny"})
    job = client.jobs.wait(job.id, timeout=PATIENCE_SECONDS)
    assert job.status == "succeeded", job
    return job


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def low_limits(redis_server: RedisServer, directory: Path) -> Settings:
    return Settings(
        redis_url=redis_server.url,
        data_directory=directory / "data",
        authentication=False,
        max_upload_bytes=1_000_000,
        max_request_bytes=300_000,
        max_request_images=100,
        max_queued_inference=3,
    )


@pytest.fixture
def service(redis_server: RedisServer, tmp_path: Path) -> Iterator[Service]:
    """An empty service with low limits; nobody works for it, so that its jobs stay queued."""
    with Service(low_limits(redis_server, tmp_path)) as service:
        service.redis.flushdb()
        yield service


Serve = Callable[[Settings], AbstractContextManager[httpx.Client]]


class _Server(uvicorn.Server):
    """Ends as soon as it is told to, where uvicorn's looks ten times a second."""

    async def main_loop(self) -> None:
        ticks = 0
        while not await self.on_tick(ticks // 10):
            ticks += 1
            await asyncio.sleep(0.01)


@contextmanager
def _served(settings: Settings) -> Iterator[httpx.Client]:
    listener = socket.create_server((HOST, 0))  # bound here, so that nobody else takes the port meanwhile
    server = _Server(uvicorn.Config(create_app(settings), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert thread.is_alive()
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE_SECONDS) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Serves the API over a real socket, to a client of it."""
    return _served


@pytest.fixture
def http(service: Service, serve: Serve) -> Iterator[httpx.Client]:
    """A client of the API on `service`, over a real socket."""
    with serve(service.settings) as client:
        yield client


@pytest.fixture(scope="module")
def lasting_http(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The same once, apart from `service`, for requests that are refused: an API starts as long as ten of them take."""
    directory = tmp_path_factory.mktemp("lasting")
    with RedisServer(directory / "redis") as server, serve(low_limits(server, directory)) as client:
        yield client


@dataclass(frozen=True)
class Filled:
    """A client of an API that has some of everything, all jobs finished, and ids of it by the names of parameters."""

    client: httpx.Client
    ids: dict[str, list[str]]


@pytest.fixture(scope="module")
def filled(serve: Serve, saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filled]:
    directory = tmp_path_factory.mktemp("filled")
    with RedisServer(directory / "redis") as server:
        settings = low_limits(server, directory).model_copy(update={"max_queued_inference": 1_000_000})
        with Service(settings) as service:
            ids = populate(service, saved_model, directory)
            done = threading.Event()
            worker = threading.Thread(target=finish_all, args=(service, done))
            worker.start()
            try:
                with serve(settings) as client:
                    for job_id in ids["job_id"]:
                        while client.get(f"/v1/jobs/{job_id}").json()["status"] != "succeeded":
                            assert worker.is_alive()
                    yield Filled(client, ids)
            finally:
                done.set()
                worker.join()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a `tiny` model's checkpoint, never trained."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    FlowPP("tiny").save(directory)
    return directory


@pytest.fixture
def checkpoint(service: Service, saved_model: Path) -> Checkpoint:
    return service.checkpoints.register(saved_model)
