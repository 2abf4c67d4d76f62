"""`flowpp reindex`: Redis is lost with all that it knew, and everybody finds the service as it was."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from api.stack import Stack
from tests.service.visitor import Visitor, flowpp, key, wait_until_recorded
from tests.waiting import LEASE_SECONDS
from worker.redis_server import RedisServer
from worker.service import Service
from worker.settings import Settings

ENDLESS = 1_000_000
TINY = {"preset": "tiny"}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Stack]]:
    monkeypatch.setenv("FLOWPP_AUTHENTICATION", "true")
    monkeypatch.setenv("FLOWPP_LEASE_SECONDS", str(LEASE_SECONDS))
    monkeypatch.setenv("FLOWPP_WEBHOOK_NETWORKS", "127.0.0.0/8")
    started: list[Stack] = []

    def start() -> Stack:
        started.append(Stack(tmp_path / "data", port=0).start())
        return started[-1]

    yield start
    for stack in started:
        stack.stop()


Visit = Callable[[Stack, str], Visitor]


@pytest.fixture
def visit() -> Iterator[Visit]:
    with ExitStack() as stack:

        def visit(service: Stack, token: str) -> Visitor:
            visitor = Visitor(service, token)
            stack.enter_context(visitor.http)
            return visitor

        yield visit


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Noise on a gradient; uint8 [40, 8, 8, 3]."""
    noise = np.random.default_rng(0).integers(0, 32, (40, 8, 8, 3), np.uint8)
    return noise + np.linspace(0, 200, 8).astype(np.uint8)[:, None]


def what_is_noted(data: Path) -> tuple[Any, ...]:
    """Bytes of owners, and when jobs are due to be cancelled or deleted."""
    settings = Settings(redis_url=(data / "redis.url").read_text().strip(), data_directory=data)
    with Service(settings) as service:
        due = [service.redis.zrange(f"flowpp:{name}", 0, -1, withscores=True) for name in ("deadlines", "expiring")]
        assert all(due)
        return service.redis.hgetall("flowpp:bytes"), *due


def lose_redis(data: Path) -> None:
    shutil.rmtree(data / "redis")


def test_all_that_was_to_be_had_is_to_be_had_again_byte_for_byte(
    start: Callable[[], Stack], visit: Visit, images: np.ndarray
) -> None:
    stack = start()
    alice = visit(stack, alices := key(stack.data, "alice", "submit"))
    admin = visit(stack, admins := key(stack.data, "root", "admin"))
    dataset, other, damaged = alice.dataset(images), admin.dataset(images[:20]), alice.dataset(images[:30])
    (file,) = (stack.data / "store" / "datasets" / damaged["id"]).rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-1])

    trained = alice.job("training", dataset=dataset["id"], model=TINY, metadata={"run": "1"})
    failed = alice.job("training", dataset=damaged["id"], model=TINY)
    admin.job("training", dataset=other["id"], model=TINY)
    assert alice.is_now(trained, "succeeded", "failed")["status"] == "succeeded"
    assert alice.is_now(failed, "succeeded", "failed")["status"] == "failed"
    endless = {"model": TINY, "training": {"steps": ENDLESS, "checkpoint_every": 100, "keep_checkpoints": 2}}
    paused = alice.job("training", "2d", dataset=dataset["id"], **endless)
    alice.has_checkpoint(paused)
    alice.http.post(f"/v1/jobs/{paused['id']}/pause")
    alice.is_now(paused, "paused")
    cancelled = alice.job("training", dataset=dataset["id"], **endless)
    alice.has_checkpoint(cancelled)
    alice.http.post(f"/v1/jobs/{cancelled['id']}/cancel")
    alice.is_now(cancelled, "cancelled")
    resting = alice.job("training", dataset=dataset["id"], **endless)
    alice.http.post(f"/v1/jobs/{resting['id']}/cancel")
    picture = io.BytesIO()
    Image.fromarray(images[0]).save(picture, "PNG")
    scored = alice.http.post(
        "/v1/likelihood-jobs", data={"model": trained["id"]}, files={"files": ("a.png", picture.getvalue())}
    ).json()
    for job in (
        scored,
        alice.job("likelihood", model=trained["id"], dataset=dataset["id"]),
        alice.job("sampling", model=trained["id"], num_samples=4),
    ):
        assert alice.is_now(job, "succeeded", "failed")["status"] == "succeeded"
    gone = alice.job("sampling", model=trained["id"], num_samples=1)
    alice.is_now(gone, "succeeded")
    assert alice.http.delete(f"/v1/jobs/{gone['id']}").status_code == 204
    first = alice.http.get("/v1/checkpoints", params={"order": "asc", "limit": 1}).json()["data"][0]
    assert alice.http.delete(f"/v1/checkpoints/{first['id']}").status_code == 204
    assert alice.http.post("/v1/webhooks", json={"url": "http://127.0.0.1:9/"}).status_code == 201
    lists = flowpp("keys", "list", "--json", "--data", stack.data).stdout
    before, admins_before = alice.all_there_is(), admin.all_there_is()
    assert len(before) > 80
    events = alice.http.get(f"/v1/jobs/{trained['id']}/events", params={"limit": 30}).json()
    wait_until_recorded(stack.data)
    noted = what_is_noted(stack.data)

    stack.stop()
    lose_redis(stack.data)
    rebuilt = flowpp("reindex", "--json", "--data", stack.data)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert json.loads(rebuilt.stdout)["damaged"] == []
    assert flowpp("reindex", "--data", stack.data).returncode == 2
    stack = start()
    alice, admin = visit(stack, alices), visit(stack, admins)
    assert alice.all_there_is() == before
    assert admin.all_there_is() == admins_before
    assert flowpp("keys", "list", "--json", "--data", stack.data).stdout == lists
    assert what_is_noted(stack.data) == noted
    stream = alice.http.get(
        f"/v1/jobs/{trained['id']}/events",
        headers={"Accept": "text/event-stream", "Last-Event-ID": events["last_id"]},
    ).text
    ids = [line.removeprefix("id: ") for line in stream.splitlines() if line.startswith("id: ")]
    rest = alice.http.get(f"/v1/jobs/{trained['id']}/events", params={"limit": 100, "after": events["last_id"]})
    assert ids == [event["id"] for event in rest.json()["data"]]

    assert alice.http.post(f"/v1/jobs/{paused['id']}/resume").status_code == 200
    alice.is_now(paused, "running")
    alice.http.post(f"/v1/jobs/{paused['id']}/cancel")
    alice.is_now(paused, "cancelled")
    steps = alice.http.get(f"/v1/jobs/{paused['id']}/metrics").json()["columns"]["step"]
    assert steps == list(range(1, len(steps) + 1))
    assert "goes on from step" in alice.http.get(f"/v1/jobs/{paused['id']}/logs").text


def test_a_job_that_ran_when_redis_was_lost_goes_on_from_its_newest_checkpoint(
    start: Callable[[], Stack], visit: Visit, images: np.ndarray
) -> None:
    stack = start()
    alice = visit(stack, token := key(stack.data, "alice", "submit"))
    dataset = alice.dataset(images)
    recipe = {"steps": 400, "checkpoint_every": 20}
    running = alice.job("training", dataset=dataset["id"], model=TINY, training=recipe)
    waiting = alice.job("training", dataset=dataset["id"], model=TINY)
    alice.has_checkpoint(running)
    wait_until_recorded(stack.data)
    for name in ("redis", "api", "training", "inference"):
        stack.children[name].kill()
        stack.children[name].wait()
    stack.stop()
    shutil.rmtree(stack.data / "runs")
    lose_redis(stack.data)
    assert flowpp("reindex", "--data", stack.data).stdout.startswith("1 keys, 0 webhooks, 1 datasets")
    with (
        RedisServer(stack.data / "redis") as server,
        Service(Settings(redis_url=server.url, data_directory=stack.data)) as service,
    ):
        job = service.jobs.get(running["id"])
        assert (job.status, job.attempt, job.failures) == ("queued", 1, 0)
        assert service.jobs.waiting("training") == [running["id"], waiting["id"]]
        last = service.events.page(job.id, limit=1000).data[-1].data
        assert last == {"status": "queued", "attempt": 1, "message": "Redis was lost while a worker held the job"}
    stack = start()
    alice = visit(stack, token)
    assert alice.is_now(running, "succeeded", "failed")["status"] == "succeeded"
    steps = alice.http.get(f"/v1/jobs/{running['id']}/metrics").json()["columns"]["step"]
    assert steps == list(range(1, 401))
    attempts = alice.http.get(f"/v1/jobs/{running['id']}/attempts").json()["data"]
    assert [attempt["status"] for attempt in attempts] == ["stopped", "succeeded"]
    assert "goes on from step" in alice.http.get(f"/v1/jobs/{running['id']}/logs").text
    assert alice.is_now(waiting, "succeeded", "failed")["status"] == "succeeded"


def test_a_job_that_a_clean_stop_put_back_is_told_so_after_redis_was_lost(
    start: Callable[[], Stack], visit: Visit, images: np.ndarray
) -> None:
    stack = start()
    alice = visit(stack, key(stack.data, "alice", "submit"))
    dataset = alice.dataset(images)
    running = alice.job("training", dataset=dataset["id"], model=TINY, training={"steps": ENDLESS})
    alice.is_now(running, "running")
    stack.stop()
    with (
        RedisServer(stack.data / "redis") as server,
        Service(Settings(redis_url=server.url, data_directory=stack.data)) as service,
    ):
        before = service.events.page(running["id"], limit=1000).data
        assert before[-1].data["status"] == "queued"
        assert service.redis.zcard("flowpp:changed") == 0
    lose_redis(stack.data)
    assert flowpp("reindex", "--data", stack.data).returncode == 0
    with (
        RedisServer(stack.data / "redis") as server,
        Service(Settings(redis_url=server.url, data_directory=stack.data)) as service,
    ):
        assert service.events.page(running["id"], limit=1000).data == before
