"""`Idempotency-Key`: the same request twice creates one thing."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from flowpp.data import encode_png
from tests.waiting import PATIENCE_SECONDS, until
from worker.models import Checkpoint
from worker.requests import SamplingRequest
from worker.service import Service
from worker.submission import Terms, prepare_sampling, submit_one

KEY = {"Idempotency-Key": '"8e03978e-40d5-43dd-bc93-6894a57f9324"'}


@pytest.fixture
def png() -> bytes:
    return encode_png(np.zeros((32, 32, 3), np.uint8))


def creating(checkpoint: Checkpoint, png: bytes) -> list[tuple[str, dict]]:
    return [
        ("/v1/datasets", {"files": {"file": ("a.png", png)}}),
        ("/v1/sampling-jobs", {"json": {"model": checkpoint.id}}),
        ("/v1/likelihood-jobs", {"data": {"model": checkpoint.id}, "files": {"files": ("a.png", png)}}),
    ]


def test_the_same_request_again_is_answered_with_what_the_first_created(
    http: httpx.Client, service: Service, checkpoint: Checkpoint, png: bytes
) -> None:
    images = io.BytesIO()
    np.save(images, np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8))
    dataset = http.post("/v1/datasets", files={"file": ("a.npy", images.getvalue())}).json()["id"]
    requests = creating(checkpoint, png)
    requests.append(
        (
            "/v1/training-jobs",
            {"json": {"dataset": dataset, "model": {"preset": "tiny"}, "training": {"batch_size": 1}}},
        )
    )
    for index, (path, body) in enumerate(requests):
        key = {"Idempotency-Key": f"key-{index}"}
        first, again = (http.post(path, headers=key, **body) for _ in range(2))
        assert first.status_code in (201, 202), first.text
        assert (again.status_code, again.json()) == (first.status_code, first.json())
        assert again.headers["location"] == first.headers["location"]
        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
    assert len(service.jobs.page().data) == 3
    assert len(service.datasets.page().data) == 2


def test_another_request_with_the_key_is_refused(http: httpx.Client, checkpoint: Checkpoint, png: bytes) -> None:
    assert http.post("/v1/sampling-jobs", headers=KEY, json={"model": checkpoint.id}).status_code == 202
    for path, body in (
        ("/v1/sampling-jobs", {"json": {"model": checkpoint.id, "seed": 1}}),
        ("/v1/datasets", {"files": {"file": ("a.png", png)}}),
    ):
        refused = http.post(path, headers=KEY, **body)
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")


def test_a_request_that_failed_may_be_sent_again(http: httpx.Client, checkpoint: Checkpoint) -> None:
    assert http.post("/v1/sampling-jobs", headers=KEY, json={"model": "ckpt_0"}).status_code == 404
    assert http.post("/v1/sampling-jobs", headers=KEY, json={"model": checkpoint.id}).status_code == 202


def test_while_the_first_is_under_way_the_second_is_refused(http: httpx.Client, service: Service, png: bytes) -> None:
    go_on = threading.Event()
    head = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    headers = KEY | {"Content-Type": "multipart/form-data; boundary=cut"}

    def slowly():
        yield head + png[:20]
        assert go_on.wait(PATIENCE_SECONDS)
        yield png[20:] + b"\r\n--cut--\r\n"

    def send() -> httpx.Response:
        with httpx.Client(base_url=http.base_url, trust_env=False, timeout=PATIENCE_SECONDS) as client:
            return client.post("/v1/datasets", headers=headers, content=slowly())

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(send)
        try:
            until(lambda: service.redis.keys("flowpp:created:*"))
            second = http.post("/v1/datasets", headers=KEY, files={"file": ("a.png", png)})
            assert (second.status_code, second.json()["code"]) == (409, "idempotency_in_progress")
        finally:
            go_on.set()
        assert first.result().status_code == 201


def test_a_request_lost_with_its_process_does_not_hold_its_key_for_long(service: Service) -> None:
    once = service.idempotency.begin("local", "k")
    assert 0 < service.redis.ttl(once.place) <= 60
    service.redis.expire(once.place, 5)
    service.idempotency.renew(once)
    assert service.redis.ttl(once.place) > 5


def test_a_late_renewal_does_not_shorten_the_note_of_what_was_created(service: Service, checkpoint: Checkpoint) -> None:
    once = service.idempotency.begin("local", "k")
    submit_one(
        service,
        prepare_sampling(service, SamplingRequest(model=checkpoint.id), terms=Terms(claim=once.claim("content"))),
    )
    service.idempotency.renew(once)
    service.idempotency.end(once)
    assert service.redis.ttl(once.place) > 86_000


@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256, "ü".encode("latin-1")])
def test_what_is_no_key_is_refused(http: httpx.Client, checkpoint: Checkpoint, key: str) -> None:
    refused = http.post("/v1/sampling-jobs", headers={"Idempotency-Key": key}, json={"model": checkpoint.id})
    assert refused.status_code == 422
    assert "idempotency-key" in refused.json()["detail"].lower()
