"""DELETE frees the store: after each kind of thing was made and deleted, it is as it was; on a directory and on S3."""

import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from api.stack import Stack
from flowpp.data import encode_png
from tests.s3 import S3, running_s3
from tests.waiting import PATIENCE_SECONDS, until
from worker.keys import NewKey
from worker.service import Service
from worker.settings import Settings

ENDLESS = {"steps": 1_000_000, "checkpoint_every": 100, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.slow)])
def stack(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    if request.param == "s3":
        monkeypatch.setenv("FLOWPP_STORE", request.getfixturevalue("s3").new_store())
    with Stack(tmp_path / "data", port=0) as stack:
        yield stack


@pytest.fixture
def service(stack: Stack) -> Iterator[Service]:
    """The records of the running stack."""
    with Service(Settings(redis_url=(stack.data / "redis.url").read_text(), data_directory=stack.data)) as service:
        yield service


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, trust_env=False, timeout=PATIENCE_SECONDS) as http:
        yield http


def stored(service: Service) -> set[str]:
    """All that is stored when it does not change any more: a training worker deletes files behind a job's end."""
    while True:
        until(lambda: not service.redis.exists("flowpp:changed"))
        before = now(service)
        time.sleep(0.5)
        if now(service) == before:
            return before


def until_stored(service: Service, expected: set[str], what: str = "") -> None:
    """Returns when the store contains exactly these files. On a busy machine files may be deleted late."""
    until(lambda: now(service) == expected, lambda: (what, now(service) ^ expected))
    assert stored(service) == expected, what


def now(service: Service) -> set[str]:
    """All files, and on a disk also folders within the kinds' own."""
    if service.store.directory is None:
        kinds = ("jobs", "datasets", "checkpoints", "keys", "webhooks", "checks")
        return {f"{kind}/{file.name}" for kind in kinds for file in service.store.listing(kind)}
    root = service.store.directory  # by os.walk, which passes over what is deleted meanwhile, as glob does not
    paths = [Path(at, name) for at, folders, files in os.walk(root) for name in (*folders, *files)]
    return {str(path.relative_to(root)) for path in paths if path.parent != root}


def local(data: Path) -> set[str]:
    """Files of caches and run directories."""
    return {str(path) for folder in ("cache", "runs") for path in (data / folder).rglob("*") if path.is_file()}


def test_what_was_made_and_deleted_has_left_nothing(stack: Stack, service: Service, http: httpx.Client) -> None:
    def upload(seed: int) -> str:
        file = io.BytesIO()
        np.save(file, np.random.default_rng(seed).integers(0, 256, (80, 8, 8, 3), np.uint8))
        return http.post("/v1/datasets", files={"file": ("images.npy", file.getvalue())}).json()["id"]

    def job(kind: str, status: str = "succeeded", **request: Any) -> str:
        name = http.post(f"/v1/{kind}-jobs", json=request).json()["id"]
        until(lambda: http.get(f"/v1/jobs/{name}").json()["status"] in (status, "failed"))
        assert http.get(f"/v1/jobs/{name}").json()["status"] == status
        return name

    def training(recipe: dict[str, Any], status: str) -> str:
        name = job("training", status, dataset=dataset, model={"preset": "tiny"}, training=recipe)
        until(lambda: http.get("/v1/checkpoints", params={"job": name}).json()["data"])
        return name

    def paused() -> str:
        name = training(ENDLESS, "running")
        http.post(f"/v1/jobs/{name}/pause")
        until(lambda: http.get(f"/v1/jobs/{name}").json()["status"] == "paused")
        return name

    def scored(count: int) -> str:
        parts = [("files", (f"{index}.png", encode_png(np.full((8, 8, 3), index, np.uint8)))) for index in range(count)]
        name = http.post("/v1/likelihood-jobs", data={"model": trained}, files=parts).json()["id"]
        until(lambda: http.get(f"/v1/jobs/{name}").json()["status"] == "succeeded")
        return name

    def delete(path: str) -> None:
        assert http.delete(path).status_code in (202, 204)
        until(lambda: http.get(path).status_code == 404)

    nothing = stored(service)
    assert nothing == set()
    dataset = upload(0)
    trained = training({"steps": 20, "checkpoint_every": 10}, "succeeded")
    making: dict[str, Callable[[], str]] = {
        "a dataset": lambda: f"/v1/datasets/{upload(1)}",
        "a training job": lambda: f"/v1/jobs/{training({'steps': 10}, 'succeeded')}",
        "a paused one": lambda: f"/v1/jobs/{paused()}",
        "one that runs": lambda: f"/v1/jobs/{training(ENDLESS, 'running')}",
        "a few images' likelihood": lambda: f"/v1/jobs/{scored(2)}",
        "many images' likelihood": lambda: f"/v1/jobs/{scored(100)}",
        "a dataset's likelihood": lambda: f"/v1/jobs/{job('likelihood', model=trained, dataset=dataset)}",
        "samples": lambda: f"/v1/jobs/{job('sampling', model=trained, num_samples=3)}",
    }
    for what, make in making.items():
        before = stored(service)
        path = make()
        assert stored(service) > before, what
        delete(path)
        until_stored(service, before, what)
    before = stored(service)
    key, _ = service.keys.create(NewKey(owner="alice"))
    assert stored(service) > before
    service.keys.revoke(key.id)
    until_stored(service, before)

    checkpoints = http.get("/v1/checkpoints").json()["data"]
    assert len(checkpoints) == 2
    assert http.get(f"/v1/checkpoints/{checkpoints[0]['id']}/download").status_code == 200
    delete(f"/v1/checkpoints/{checkpoints[0]['id']}")
    until(lambda: not any(checkpoints[0]["id"] in name for name in stored(service)))
    delete(f"/v1/jobs/{trained}")
    delete(f"/v1/datasets/{dataset}")
    assert http.get("/readyz").status_code == 200
    until_stored(service, nothing)
    until(lambda: local(stack.data) == set(), lambda: local(stack.data))
