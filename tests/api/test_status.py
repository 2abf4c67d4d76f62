"""`flowpp status` and what it asks: the service at a moment, for a person and for programs."""

import json
import time

import httpx
import pytest

from api.client import Client, Job
from api.stack import Stack
from tests.api.conftest import Serve
from tests.api.test_cli import flowpp
from tests.worker.conftest import Submit
from worker.jobs import Progress
from worker.keys import NewKey
from worker.redis_server import free_port
from worker.service import Service


@pytest.fixture
def running(service: Service) -> str:
    """A training job of alice's that is in its 6th step; its id."""
    Submit(service)("training", owner="alice", total_steps=10)
    (job,) = service.jobs.claim("training", "a worker")
    metrics = {"step": 6, "images_seen": 48, "train_bits_per_dim": 6.54321, "images_per_second": 80.0}
    service.events.append(job, "metrics", metrics | {"validation_bits_per_dim": 7.0})
    service.jobs.set_progress(job, Progress.at(6, 10))
    return job.id


def test_a_person_is_told_what_is_missing_what_waits_and_what_runs(
    service: Service, http: httpx.Client, running: str
) -> None:
    Submit(service)("sampling")
    told = flowpp("status", "--url", str(http.base_url))
    assert told.returncode == 1, told.stderr
    lines = dict(line.split("  ", 1) for line in told.stdout.splitlines())
    shown = {name: said.strip() for name, said in lines.items()}
    assert shown == {
        "service": f"{str(http.base_url).rstrip('/')} is not ready",
        "redis": "ok",
        "store": "ok",
        "training queue": "no worker, nothing waits",
        "inference queue": "no worker, 1 waiting, the next one for 0 s",
        "training jobs": "1 running",
        "likelihood jobs": "none",
        "sampling jobs": "1 queued",
        running: "running, 60 % of 10 steps, 6.543 bits/dim, validation 7.000, 80 images/s",
    } | {"inference queue": shown["inference queue"]}
    assert shown["inference queue"].startswith("no worker, 1 waiting, the next one for ")


def test_a_service_that_is_ready_exits_with_0(stack: Stack, client: Client, trained: Job) -> None:
    told = flowpp("status", "--url", stack.url)
    assert told.returncode == 0, told.stderr
    assert f"{stack.url} is ready" in told.stdout
    assert "1 worker, nothing waits" in told.stdout
    read = json.loads(flowpp("status", "--json", "--url", stack.url).stdout)
    assert (read["status"], read["missing"], read["checks"]["store"]) == ("ok", [], "ok")
    assert read["queues"]["inference"]["workers"] == 1
    assert read["jobs"]["training"]["succeeded"] >= 1
    assert client.readiness().status == "ok"
    assert client.status().at == pytest.approx(time.time(), abs=60)


def test_without_redis_it_says_so_at_once(service: Service, serve: Serve) -> None:
    settings = service.settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    with serve(settings) as http:
        told = flowpp("status", "--url", str(http.base_url))
        read = json.loads(flowpp("status", "--json", "--url", str(http.base_url)).stdout)
    assert told.returncode == 1
    assert "redis      Redis does not answer: ConnectionError" in told.stdout
    assert "inference  unknown" in told.stdout
    assert "queues" not in read


def test_no_service_exits_with_3() -> None:
    assert flowpp("status", "--url", f"http://127.0.0.1:{free_port()}").returncode == 3


def test_a_key_sees_the_jobs_of_its_owner_alone(service: Service, serve: Serve, running: str) -> None:
    def token(owner: str, scope: str) -> str:
        return service.keys.create(NewKey.model_validate({"owner": owner, "scopes": (scope,)}))[1]

    Submit(service)("sampling", owner="bob")
    with serve(service.settings.model_copy(update={"authentication": True})) as http:
        seen = {
            who: http.get("/v1/status", headers={"Authorization": f"Bearer {token(*who)}"}).json()
            for who in (("alice", "read"), ("bob", "read"), ("root", "admin"))
        }
        assert http.get("/v1/status").status_code == 401
        refused = flowpp("status", "--url", str(http.base_url))
    assert [[job["id"] for job in each["training"]] for each in seen.values()] == [[running], [], [running]]
    assert [each["jobs"]["training"]["running"] for each in seen.values()] == [1, 0, 1]
    assert [each["jobs"]["sampling"]["queued"] for each in seen.values()] == [0, 1, 1]
    assert (refused.returncode, "flowpp keys create" in refused.stderr) == (2, True)
