"""A small life of the service, with mishaps: what is secret is afterwards in no log, event, answer, span or file."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from api.stack import Stack
from examples import photographs
from flowpp.data import encode_png
from tests.collector import collecting
from tests.waiting import PATIENCE_SECONDS, until
from worker.redis_server import HOST, RedisServer

REDIS_PASSWORD = "redis-Passw0rd-7f3a"
STORE_SECRET = "aws-Secret-91be"
BASIC = "basic-Passw0rd-20cd"
WRONG = "Wr0ngSecretOfAKey-55aa"


def test_nothing_secret_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with RedisServer(tmp_path / "redis", log=tmp_path / "redis.log") as server, collecting(monkeypatch) as collector:
        with redis.Redis(HOST, server.port) as admin:
            admin.config_set("requirepass", REDIS_PASSWORD)
        monkeypatch.setenv("FLOWPP_REDIS_URL", f"redis://:{REDIS_PASSWORD}@{HOST}:{server.port}/0")
        monkeypatch.setenv("FLOWPP_AUTHENTICATION", "true")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", STORE_SECRET)
        with Stack(tmp_path / "data", port=0) as stack:
            environment = {**os.environ, "FLOWPP_STORE": str(tmp_path / "data" / "store")}
            token = flowpp("keys", "create", "--owner", "alice", environment=environment).strip()
            told += [flowpp("keys", "list", *more, environment=environment) for more in ((), ("--json",))]

            def keep(response: httpx.Response) -> None:
                told.append(f"{response.headers}\n{response.read().decode(errors='replace')}")

            with httpx.Client(
                base_url=stack.url, trust_env=False, timeout=PATIENCE_SECONDS, event_hooks={"response": [keep]}
            ) as http:
                live(http, token, tmp_path / "data" / "store")
                send_secrets_where_they_do_not_belong(http, token)
                server.stop()
                assert http.get("/readyz").status_code == 503
                assert http.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"}).status_code == 503
                for name in ("training", "inference"):
                    until(lambda name=name: "Error" in (tmp_path / "data" / "logs" / f"{name}.log").read_text())
    logs = {path.name: path.read_text() for path in (tmp_path / "data" / "logs").iterdir()}
    assert all(log for log in logs.values())
    files = {str(path): path.read_bytes().decode(errors="replace") for path in files_of(tmp_path / "data" / "store")}
    assert any("secret_sha256" in content for content in files.values())
    spans = b"".join(collector.received).decode(errors="replace")
    assert collector.named("GET /v1/jobs/{job_id}")
    secret = token.split("_", 2)[2]
    for what in (secret, REDIS_PASSWORD, STORE_SECRET, BASIC, WRONG):
        for name, content in (logs | files | {"spans": spans}).items():
            assert what not in content, f"{name}: ...{content[content.find(what) - 300 :][:400]}"
        for answer in told:
            assert what not in answer, answer


def files_of(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def flowpp(*arguments: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", "from api.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def live(http: httpx.Client, token: str, store: Path) -> None:
    """A dataset, a training job that succeeds and one that fails, samples, a score, and all there is to be read."""
    http.headers["Authorization"] = f"Bearer {token}"
    images = photographs.patches()[0][:12]
    files = [("file", (f"{index}.png", encode_png(image))) for index, image in enumerate(images)]
    dataset, lost = (http.post("/v1/datasets", files=some).json()["id"] for some in (files, files[1:]))
    body = {"dataset": dataset, "model": {"preset": "tiny"}, "training": {"steps": 2, "init_batch_size": 4}}
    job = ended(http, http.post("/v1/training-jobs", json=body).json()["id"])
    assert job["status"] == "succeeded", job["error"]
    for path in files_of(store / "datasets" / lost):
        if path.suffix == ".npy":
            path.write_bytes(b"damaged")
    failed = ended(http, http.post("/v1/training-jobs", json=body | {"dataset": lost}).json()["id"])
    assert failed["status"] == "failed", failed
    ended(http, http.post("/v1/sampling-jobs", json={"model": job["id"], "num_samples": 1}).json()["id"])
    ended(
        http, http.post("/v1/likelihood-jobs", data={"model": job["id"]}, files=[("files", files[0][1])]).json()["id"]
    )
    for each in http.get("/v1/jobs").json()["data"]:
        for what in ("", "/events", "/logs", "/attempts", "/metrics", "/artifacts"):
            assert http.get(f"/v1/jobs/{each['id']}{what}").status_code == 200
    for path in ("/v1/datasets", "/v1/checkpoints", "/docs", "/openapi.json", "/healthz"):
        assert http.get(path).status_code == 200
    del http.headers["Authorization"]


def send_secrets_where_they_do_not_belong(http: httpx.Client, token: str) -> None:
    wrong = f"{token[:31]}_{WRONG}"
    right: dict[str, Any] = {"Authorization": f"Bearer {token}"}
    ask: list[Callable[[], httpx.Response]] = [
        lambda: http.get("/v1/jobs", headers={"Authorization": f"Bearer {wrong}"}),
        lambda: http.get("/v1/jobs", headers={"Authorization": token}),
        lambda: http.get("/v1/jobs", headers={"Authorization": f"Token {token}"}),
        lambda: http.get("/v1/jobs", headers={"X-API-Key": token, "Cookie": f"key={token}"}),
        lambda: http.get("/v1/jobs", auth=("alice", BASIC)),
        lambda: http.get("/v1/jobs", params={"key": token, "access_token": token}),
        lambda: http.get(f"/v1/jobs/{token}"),
    ]
    assert [each().status_code for each in ask] == [401] * len(ask)
    for method, path, rest in (
        ("GET", f"/v1/jobs/{token}", {}),
        ("GET", f"/{token}", {}),
        ("GET", "/v1/jobs", {"params": {"after": token}}),
        ("GET", "/v1/jobs", {"params": {"key": token, "limit": token}}),
        ("POST", "/v1/sampling-jobs", {"json": {"model": token}}),
        ("POST", "/v1/sampling-jobs", {"json": {token: token}}),
        ("POST", "/v1/likelihood-jobs", {"data": {"model": "m", token: token}, "files": {"files": (token, b"x")}}),
        ("POST", "/v1/datasets", {"files": {"file": (token, b"x")}}),
        ("POST", "/v1/datasets", {"files": {token: ("a.png", b"x")}}),
        ("POST", "/v1/sampling-jobs", {"json": {"model": "m"}, "headers": right | {"Idempotency-Key": f"{token} x"}}),
        ("GET", "/v1/jobs", {"headers": right | {"Host": token, "Origin": token}}),
    ):
        response = http.request(method, path, **{"headers": right, **rest})
        assert response.status_code < 500


def ended(http: httpx.Client, job: str) -> dict[str, Any]:
    def now() -> dict[str, Any]:
        return dict(http.get(f"/v1/jobs/{job}").json())

    return until(lambda: found if (found := now())["status"] in ("succeeded", "failed") else None, now)
