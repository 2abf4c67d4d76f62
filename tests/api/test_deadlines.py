"""`Cancel-After` on what creates a job."""

from typing import Any

import httpx
import numpy as np
import pytest

from api.deadlines import seconds_of
from flowpp.data import encode_png
from worker.models import Checkpoint
from worker.reaper import reap
from worker.service import Service

PNG = encode_png(np.zeros((32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        *(("5", 5), ("90", 90), ("90s", 90), ("5m", 300), ("2h", 7_200), ("1d", 86_400), ("30d", 2_592_000)),
        *(("1h30m45s", 5_445), (" 10 ", 10), ("10S", 10)),
        *(("4", None), ("4s", None), ("30d1s", None), ("31d", None), ("0", None), ("-5", None), ("1.5h", None)),
        *(("", None), ("soon", None), ("5x", None), ("5m2h", None), ("٣٠", None), ("9" * 5_000, None)),
    ],
)
def test_a_duration_is_a_number_of_seconds_or_has_units(duration: str, seconds: int | None) -> None:
    assert seconds_of(duration) == seconds


def creating(http: httpx.Client, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    dataset = http.post("/v1/datasets", files=[("file", (f"{i}.png", PNG)) for i in range(9)]).json()["id"]
    return {
        "training": {"json": {"dataset": dataset, "model": {"preset": "tiny"}, "training": {"batch_size": 4}}},
        "likelihood": {"data": {"model": checkpoint.id}, "files": {"files": ("a.png", PNG)}},
        "sampling": {"json": {"model": checkpoint.id}},
    }


def test_a_job_of_any_kind_is_cancelled_so_long_after_its_creation(
    http: httpx.Client, service: Service, checkpoint: Checkpoint
) -> None:
    for kind, body in creating(http, checkpoint).items():
        job = http.post(f"/v1/{kind}-jobs", headers={"Cancel-After": "2h"}, **body).json()
        assert job["cancel_at"] == pytest.approx(job["created_at"] + 7_200, abs=0.01)
        service.redis.zadd("flowpp:deadlines", {job["id"]: 1})  # as waiting would
        reap(service)
        assert http.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
        last = http.get(f"/v1/jobs/{job['id']}/events").json()["data"][-1]
        assert last["data"]["message"] == "cancelled: its Cancel-After ran out"


def test_a_job_without_one_has_no_deadline(http: httpx.Client, service: Service, checkpoint: Checkpoint) -> None:
    assert http.post("/v1/sampling-jobs", json={"model": checkpoint.id}).json()["cancel_at"] is None
    assert service.redis.zcard("flowpp:deadlines") == 0


@pytest.mark.parametrize("kind", ["training", "likelihood", "sampling"])
@pytest.mark.parametrize("duration", ["soon", "4", "31d", "", "1" * 100])
def test_what_is_no_such_time_is_refused_and_creates_nothing(
    http: httpx.Client, checkpoint: Checkpoint, kind: str, duration: str
) -> None:
    response = http.post(f"/v1/{kind}-jobs", headers={"Cancel-After": duration}, **creating(http, checkpoint)[kind])
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert response.json()["errors"][0]["path"] == "Cancel-After"
    assert "at least 5 seconds and at most 30 days" in response.json()["detail"]
    assert http.get("/v1/jobs").json()["data"] == []
