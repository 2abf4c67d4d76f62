"""An API process that asks for keys, over a Redis server and a store that hold some of everything, and a worker."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil

from flowpp.data import build_image_set
from tests.waiting import PATIENCE_SECONDS, until
from worker import child
from worker.jobs import Progress
from worker.keys import NewKey
from worker.presence import Presence
from worker.redis_server import HOST, RedisServer, free_port
from worker.requests import LikelihoodRequest, SamplingRequest
from worker.service import Service
from worker.settings import Settings
from worker.submission import prepare_likelihood, prepare_sampling, submit_one
from worker.webhooks import NewWebhook

OWNER = "alice"


@dataclass(frozen=True)
class Served:
    """The API process, the token of a key of it, ids of what it has, and where it logs and keeps temporary files."""

    url: str
    token: str
    ids: dict[str, list[str]]
    log: Path
    temporary: Path
    process: psutil.Process


@contextmanager
def serving(redis_server: RedisServer, saved_model: Path, directory: Path) -> Iterator[Served]:
    """Serves over `directory`, until the block ends."""
    settings = Settings(redis_url=redis_server.url, data_directory=directory / "data")
    temporary = directory / "temporary"
    temporary.mkdir()
    environment = {
        **os.environ,
        "FLOWPP_REDIS_URL": settings.redis_url,
        "FLOWPP_DATA_DIRECTORY": str(settings.data_directory),
        "FLOWPP_AUTHENTICATION": "true",
        "FLOWPP_REQUESTS_PER_MINUTE": "1000000",
        "FLOWPP_MAX_JOBS_PER_OWNER": "1000000",
        "FLOWPP_MAX_LARGE_UPLOADS": "1000",
        "FLOWPP_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
    }
    port, log = free_port(), directory / "api.log"
    with (
        Service(settings) as service,
        Presence(service.redis, "training", "worker-1"),
        Presence(service.redis, "inference", "worker-1"),
    ):
        service.redis.flushall()
        _, token = service.keys.create(NewKey(owner=OWNER, scopes=("admin",)))
        ids = populate(service, saved_model, directory)
        command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
        api = child.start(command, log, environment)
        done = threading.Event()
        worker = threading.Thread(target=finish_all, args=(service, done))
        worker.start()
        try:
            url = f"http://{HOST}:{port}"
            await_answer(url)
            yield Served(url, token, ids, log, temporary, psutil.Process(api.pid))
            assert api.poll() is None, child.tail(log)
            assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        finally:
            done.set()
            worker.join()
            child.stop(api, PATIENCE_SECONDS)


def populate(service: Service, saved_model: Path, directory: Path) -> dict[str, list[str]]:
    """Some of each, as many of them will be deleted. Ids by the name of what holds them."""
    np.save(directory / "images.npy", np.zeros((10, 32, 32, 3), np.uint8))
    image_set = build_image_set(directory / "images.npy", directory / "set")
    datasets = [service.datasets.register(image_set, owner=OWNER).id for _ in range(10)]
    checkpoints = [service.checkpoints.register(saved_model, owner=OWNER).id for _ in range(10)]
    jobs = []
    for index in range(30):
        if index % 2:
            jobs.append(submit_one(service, prepare_sampling(service, SamplingRequest(model=checkpoints[0]))).id)
        else:
            request = LikelihoodRequest(model=checkpoints[0], dataset=datasets[0])
            jobs.append(submit_one(service, prepare_likelihood(service, request)).id)
    hooks = [service.webhooks.create(NewWebhook(url="http://127.0.0.1:9/"), OWNER).id for _ in range(10)]
    return {
        "job_id": jobs,
        "webhook_id": hooks,
        "dataset_id": datasets,
        "dataset": datasets,
        "checkpoint_id": checkpoints,
        "model": checkpoints,
        "name": ["result.bin", "page.html"],
    }


def finish_all(service: Service, done: threading.Event) -> None:
    """Ends each job as soon as it is queued, with two files: nothing waits, and each stream of events ends."""
    while not done.wait(0.02):
        for queue in ("training", "inference"):
            for job in service.jobs.claim(queue, "worker-1", 64):
                prefix = f"jobs/{job.id}/output"
                files = service.settings.data_directory / "files"
                if not files.exists():
                    files.mkdir()
                    (files / "result.bin").write_bytes(b"0123456789")
                    (files / "page.html").write_text("<script>alert(1)</script>")
                service.store.put(prefix, files)
                service.jobs.succeed([(job, {}, prefix, Progress.at(1, 1))])


def await_answer(url: str) -> None:
    def answers() -> bool:
        with suppress(httpx.TransportError):
            return bool(httpx.get(f"{url}/healthz", trust_env=False))
        return False

    until(answers, f"{url} does not answer")
