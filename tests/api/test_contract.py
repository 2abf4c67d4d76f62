"""The API does what its OpenAPI says, and refuses what it does not: schemathesis asks, and finds nothing."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from flowpp.data import build_image_set
from worker import child
from worker.jobs import Progress
from worker.keys import NewKey
from worker.presence import Presence
from worker.redis_server import HOST, RedisServer, free_port
from worker.requests import LikelihoodRequest, SamplingRequest
from worker.service import Service
from worker.settings import Settings

OWNER = "alice"


@dataclass(frozen=True)
class Served:
    """An API process that asks for keys, the token of one, and ids of what it has."""

    url: str
    token: str
    ids: dict[str, list[str]]
    log: Path


@pytest.fixture
def served(redis_server: RedisServer, saved_model: Path, tmp_path: Path) -> Iterator[Served]:
    directory = tmp_path
    settings = Settings(redis_url=redis_server.url, data_directory=directory / "data")
    environment = {
        **os.environ,
        "FLOWPP_REDIS_URL": settings.redis_url,
        "FLOWPP_DATA_DIRECTORY": str(settings.data_directory),
        "FLOWPP_AUTHENTICATION": "true",
        "FLOWPP_REQUESTS_PER_MINUTE": "1000000",
        "FLOWPP_MAX_JOBS_PER_OWNER": "1000000",
        "FLOWPP_MAX_LARGE_UPLOADS": "1000",
        "OMP_NUM_THREADS": "1",
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
            yield Served(url, token, ids, log)
            assert api.poll() is None, child.tail(log)
        finally:
            done.set()
            worker.join()
            child.stop(api, 10)


def populate(service: Service, saved_model: Path, directory: Path) -> dict[str, list[str]]:
    """Some of each, as many of them will be deleted. Ids by the name of what holds them."""
    np.save(directory / "images.npy", np.zeros((10, 32, 32, 3), np.uint8))
    image_set = build_image_set(directory / "images.npy", directory / "set")
    datasets = [service.datasets.register(image_set, owner=OWNER).id for _ in range(10)]
    checkpoints = [service.checkpoints.register(saved_model, owner=OWNER).id for _ in range(10)]
    jobs = []
    for index in range(30):
        if index % 2:
            jobs.append(service.submit_sampling(SamplingRequest(model=checkpoints[0])).id)
        else:
            request = LikelihoodRequest(model=checkpoints[0], dataset=datasets[0])
            jobs.append(service.submit_likelihood(request).id)
    return {
        "job_id": jobs,
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
    deadline = time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}/healthz", trust_env=False)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def check(served: Served, max_examples: int) -> None:
    """All checks of schemathesis, in all its phases, over each operation that the OpenAPI has; the same each time."""
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.url}/openapi.json", "--no-color"),
        *("--header", f"Authorization: Bearer {served.token}", "--checks", "all", "--suppress-health-check", "all"),
        *("--max-examples", str(max_examples), "--generation-deterministic", "--continue-on-failure"),
        *("--request-timeout", "20"),
    ]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.api.contract_hooks",
        "FLOWPP_CONTRACT_IDS": json.dumps(served.ids),
        "NO_PROXY": "*",
    }
    found = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1_500
    )
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-5_000:]
    log = served.log.read_text()
    assert "Traceback" not in log
    for answered in ('/v1/training-jobs HTTP/1.1" 202', '/artifacts/page.html HTTP/1.1" 200', 'HTTP/1.1" 204'):
        assert answered in log, "nothing was there to be found"


def test_schemathesis_finds_nothing_at_first_sight(served: Served) -> None:
    check(served, max_examples=10)


@pytest.mark.contract
@pytest.mark.timeout(1_600)
def test_schemathesis_finds_nothing(served: Served) -> None:
    check(served, max_examples=300)
