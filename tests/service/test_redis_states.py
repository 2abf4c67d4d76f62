"""`flowpp serve` over a Redis server that answers and does not serve for a while: all of it waits, and loses nothing.

One state is a part of `make test`, `make test-faults` runs all.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis

from api.client import Client
from api.stack import Stack
from tests.redis_states import STATES
from worker import child
from worker.redis_server import RedisServer

QUICK = {"READONLY", "NOREPLICAS"}
CASES = [pytest.param(word, marks=() if word in QUICK else pytest.mark.faults, id=word) for word in STATES]

# These refuse writes alone.
READABLE = {"READONLY", "NOREPLICAS", "OOM", "MISCONF"}
LEASE_SECONDS = 3
STATE_SECONDS = 2 * LEASE_SECONDS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def stack(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FLOWPP_REDIS_URL", server.url)
        environment.setenv("FLOWPP_LEASE_SECONDS", str(LEASE_SECONDS))
        environment.setenv("OMP_NUM_THREADS", "1")
        stack = Stack(tmp_path_factory.mktemp("stack"), port=0).start()
    try:
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url) as client:
        yield client


@pytest.fixture(scope="module")
def dataset(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    return client.datasets.upload(path).id


def test_a_script_flush_changes_nothing(server: RedisServer, client: Client, dataset: str) -> None:
    with redis.Redis.from_url(server.url) as other:
        other.script_flush()
    job = client.training_jobs.create(dataset=dataset, model={"preset": "tiny"}, training={"steps": 2})
    assert client.jobs.wait(job.id, timeout=120).status == "succeeded"


@pytest.mark.parametrize("word", CASES)
@pytest.mark.timeout(400)
def test_all_wait_and_nothing_is_lost(
    word: str, server: RedisServer, stack: Stack, client: Client, dataset: str
) -> None:
    training = client.training_jobs.create(dataset=dataset, model={"preset": "tiny"}, training={"steps": 400})
    queued = client.training_jobs.create(dataset=dataset, model={"preset": "tiny"}, training={"steps": 2})
    _until(lambda: _step(client, training.id) > 2, "no step is taken")
    heard: list[str] = []
    stream = threading.Thread(target=lambda: heard.extend(event.type for event in client.jobs.events(training.id)))
    stream.start()

    form = {"dataset": dataset, "model": {"preset": "tiny"}, "training": {"steps": 2}}
    with httpx.Client(base_url=stack.url, trust_env=False, timeout=60) as http:
        with STATES[word](server):
            ends = time.monotonic() + STATE_SECONDS
            refused = http.post("/v1/training-jobs", json=form)
            assert (refused.status_code, refused.json()["code"]) == (503, "redis_unreachable"), refused.text
            assert int(refused.headers["retry-after"]) > 0
            read = http.get(f"/v1/jobs/{training.id}")
            if word in READABLE:
                assert read.status_code == 200
            else:
                assert (read.status_code, read.json()["code"]) == (503, "redis_unreachable")
                events = http.get(f"/v1/jobs/{training.id}/events", headers={"Accept": "text/event-stream"})
                assert events.status_code == 503
            ready = http.get("/readyz")
            assert ready.status_code == 503
            assert ready.json()["checks"]["redis"].startswith("Redis ")
            assert http.get("/healthz").status_code == 200
            while time.monotonic() < ends:
                stack.check()  # raises if a process has ended
                time.sleep(0.1)
        _until(lambda: http.get("/readyz").status_code == 200, "it is not ready again")
        _until(lambda: http.post("/v1/training-jobs", json=form).status_code == 202, "jobs are still refused")
    ended = client.jobs.wait(training.id, timeout=180)
    assert (ended.status, ended.attempt) == ("succeeded", 1), ended
    steps = client.jobs.metrics(training.id).columns["step"]
    assert steps == list(range(1, 401)), "each step is there once"
    assert client.jobs.wait(queued.id, timeout=120).status == "succeeded"
    scored = client.sampling_jobs.create(model=training.id, num_samples=2)
    assert client.jobs.wait(scored.id, timeout=120).status == "succeeded"
    stream.join(60)
    assert not stream.is_alive()
    assert heard.count("metrics") == 400
    stack.check()


def test_serve_waits_for_a_server_that_refuses_at_the_start(server: RedisServer, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    command = [Path(sys.executable).with_name("flowpp"), "serve", "--port", "0", "--data", tmp_path / "data"]
    with STATES["READONLY"](server):
        process = child.start(command, log, os.environ | {"FLOWPP_REDIS_URL": server.url, "OMP_NUM_THREADS": "1"})
        time.sleep(STATE_SECONDS)
        assert process.poll() is None, child.tail(log)
    try:
        _until(lambda: "serves on" in log.read_text(), "it does not start", 120)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            child.sweep(process)
            raise


def test_a_command_beside_the_service_names_the_state_in_one_sentence(server: RedisServer, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("flowpp"), "keys", "create", "--owner", "alice"]
    with STATES["READONLY"](server):
        environment = os.environ | {"FLOWPP_REDIS_URL": server.url, "FLOWPP_STORE": str(tmp_path)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip().count("\n") == 0
    assert "READONLY" in ended.stderr


def _step(client: Client, job_id: str) -> int:
    progress = client.jobs.get(job_id).progress
    return progress.step if progress else 0


def _until(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
