"""Keys over HTTP: who is let in, what each may do and see, and how often."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from api.app import create_app
from flowpp.data import build_image_set
from tests.api.conftest import Serve
from worker.keys import Caller, NewKey, Quota
from worker.requests import TrainingRequest
from worker.service import Service
from worker.submission import Terms, submit_training
from worker.webhooks import NewWebhook


@pytest.fixture
def guarded(service: Service, serve: Serve) -> Iterator[httpx.Client]:
    """A client without a key of an API that asks for one."""
    with serve(service.settings.model_copy(update={"authentication": True})) as client:
        yield client


def key(service: Service, owner: str, *scopes: str, **quota: int) -> dict[str, str]:
    """The header of a new key."""
    _, token = service.keys.create(NewKey(owner=owner, scopes=scopes or ("submit",), quota=Quota(**quota)))
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": f"Bearer flowpp_{'0' * 24}_secret"},
    ],
)
def test_without_a_known_key_nothing_is_answered(guarded: httpx.Client, headers: dict[str, str]) -> None:
    document = guarded.get("/openapi.json").json()
    operations = [(method, path) for path, found in document["paths"].items() for method in found]
    protected = [(method, path) for method, path in operations if path.startswith("/v1/")]
    assert len(protected) >= 20
    for method, path in protected:
        response = guarded.request(method, path.replace("{", "").replace("}", ""), headers=headers)
        assert (response.status_code, response.json()["code"]) == (401, "unauthenticated"), (method, path)
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert document["paths"][path][method]["security"], (method, path)
    for path in ("/healthz", "/readyz", "/docs"):
        assert guarded.get(path).status_code in (200, 503)


def test_a_key_may_do_what_its_scopes_say(guarded: httpx.Client, service: Service) -> None:
    reader, submitter = key(service, "alice", "read"), key(service, "alice", "submit")
    assert guarded.get("/v1/jobs", headers=reader).status_code == 200
    for method, path in (("POST", "/v1/datasets"), ("DELETE", "/v1/jobs/job_0"), ("POST", "/v1/jobs/job_0/cancel")):
        refused = guarded.request(method, path, headers=reader)
        assert (refused.status_code, refused.json()["code"]) == (403, "scope_missing")
        assert guarded.request(method, path, headers=submitter).status_code in (404, 415)


def test_what_is_another_owners_is_not_there(
    guarded: httpx.Client, service: Service, saved_model: Path, tmp_path: Path
) -> None:
    """Each operation of the OpenAPI with an id in its path, tried on another's objects; ids in bodies, and lists."""
    alice, bob, admin = key(service, "alice"), key(service, "bob"), key(service, "root", "admin")
    np.save(tmp_path / "images.npy", np.zeros((10, 32, 32, 3), np.uint8))
    dataset = service.datasets.register(build_image_set(tmp_path / "images.npy", tmp_path / "set"), owner="alice")
    checkpoint = service.checkpoints.register(saved_model, owner="alice")
    wanted = TrainingRequest.model_validate({"dataset": dataset.id, "model": {"preset": "tiny"}})
    job = submit_training(service, wanted, Terms(Caller("alice", frozenset({"submit"}))))
    webhook = service.webhooks.create(NewWebhook(url="https://example.com"), "alice")
    ids = {"job_id": job.id, "dataset_id": dataset.id, "checkpoint_id": checkpoint.id, "name": "grid.png"}
    ids["webhook_id"] = webhook.id
    document = guarded.get("/openapi.json").json()
    tried = 0
    for path, operations in document["paths"].items():
        if "_id}" not in path:
            continue
        for method in operations:
            response = guarded.request(method, path.format(**ids), headers=bob)
            assert response.status_code == 404, (method, path, response.text)
            assert alice["Authorization"] not in response.text
            tried += 1
    assert tried >= 18
    for body in (
        ("/v1/training-jobs", {"dataset": dataset.id, "model": {"preset": "tiny"}}),
        ("/v1/likelihood-jobs", {"model": checkpoint.id, "dataset": dataset.id}),
        ("/v1/likelihood-jobs", {"model": job.id, "dataset": dataset.id}),
        ("/v1/sampling-jobs", {"model": checkpoint.id}),
        ("/v1/sampling-jobs", {"model": job.id}),
    ):
        assert guarded.post(body[0], json=body[1], headers=bob).status_code == 404, body
    for things in ("jobs", "datasets", "checkpoints", "webhooks"):
        assert guarded.get(f"/v1/{things}", headers=bob).json()["data"] == []
        for who in (alice, admin):
            (seen,) = guarded.get(f"/v1/{things}", headers=who).json()["data"]
            assert seen["owner"] == "alice"
        after = ids[f"{things[:-1]}_id"]
        assert guarded.get(f"/v1/{things}", headers=bob, params={"after": after}).status_code == 404
    assert service.jobs.get(job.id).status == "queued", "one of the requests has changed it"


def test_a_key_has_so_many_requests_a_minute(guarded: httpx.Client, service: Service) -> None:
    few, many = key(service, "alice", requests_per_minute=3), key(service, "alice")
    answers = [guarded.get("/v1/jobs", headers=few) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[0].headers["ratelimit-policy"] == '"requests";q=3;w=60'
    assert answers[0].headers["ratelimit"].startswith('"requests";r=2;t=')
    assert answers[3].json()["code"] == "rate_limited"
    assert 1 <= int(answers[3].headers["retry-after"]) <= 60
    assert guarded.get("/v1/jobs", headers=many).status_code == 200


def test_a_keys_quota_holds(guarded: httpx.Client, service: Service, saved_model: Path) -> None:
    checkpoint = service.checkpoints.register(saved_model, owner="alice")
    body: dict[str, Any] = {"model": checkpoint.id, "num_samples": 3}
    one_job, few_images = key(service, "alice", max_jobs=1), key(service, "alice", max_images=2)
    refused = guarded.post("/v1/sampling-jobs", json=body, headers=few_images)
    assert (refused.status_code, refused.json()["code"]) == (422, "too_many_samples")
    assert guarded.post("/v1/sampling-jobs", json=body, headers=one_job).status_code == 202
    refused = guarded.post("/v1/sampling-jobs", json=body, headers=one_job)
    assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")
    full = key(service, "alice", max_bytes=1)
    refused = guarded.post("/v1/datasets", files={"file": ("a.png", b"")}, headers=full)
    assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "attacker.example"},
        {"Origin": "https://attacker.example"},
        {"Origin": "null"},
        {"X-Forwarded-For": "192.0.2.1"},
        {"Forwarded": "for=192.0.2.1"},
    ],
)
def test_without_authentication_only_this_machine_is_answered(http: httpx.Client, headers: dict[str, str]) -> None:
    assert http.get("/v1/jobs", headers={"Origin": "http://localhost:3000"}).status_code == 200
    refused = http.get("/v1/jobs", headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (403, "not_loopback")


def test_without_authentication_another_address_of_this_machine_is_not_answered(service: Service) -> None:
    """As where the API listens on all addresses, by which the network comes in."""
    import asyncio

    transport_app = create_app(service.settings)

    async def ask(host: str) -> int:
        received: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            received.append(message)

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/presets",
            "raw_path": b"/v1/presets",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "server": (host, 8000),
            "client": ("127.0.0.1", 1),
            "scheme": "http",
            "http_version": "1.1",
        }
        await transport_app(scope, receive, send)
        return int(received[0]["status"])

    assert asyncio.run(ask("127.0.0.1")) == 200
    assert asyncio.run(ask("192.0.2.1")) == 403


def test_a_missing_authentication_is_said_in_the_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    import asyncio

    app = create_app(service.settings)
    asyncio.run(_start(app))
    assert "authentication is off" in caplog.text


async def _start(app: Any) -> None:
    app.build_middleware_stack()
