"""A training job in a running stack, as a webhook is told of it."""

from pathlib import Path

import httpx
import numpy as np
import pytest

from api.schemas import JobEvent
from api.stack import Stack
from tests.api.receiver import receiving
from tests.waiting import PATIENCE_SECONDS, until


def test_a_training_job_is_told_from_the_queue_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWPP_WEBHOOK_NETWORKS", "127.0.0.0/8")
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    with (
        receiving() as receiver,
        Stack(tmp_path / "data", port=0) as stack,
        httpx.Client(base_url=stack.url, trust_env=False, timeout=PATIENCE_SECONDS) as http,
    ):
        webhook = http.post("/v1/webhooks", json={"url": receiver.url()}).raise_for_status().json()
        with (tmp_path / "images.npy").open("rb") as file:
            dataset = http.post("/v1/datasets", files={"file": ("images.npy", file)}).raise_for_status().json()
        wanted = {"dataset": dataset["id"], "model": {"preset": "tiny"}, "training": {"steps": 4}}
        job = http.post("/v1/training-jobs", json=wanted).raise_for_status().json()

        def told_now() -> dict[str, dict]:
            return {said["type"]: said for said in (each.verified(webhook["secret"]) for each in receiver.received)}

        told = until(lambda: found if len(found := told_now()) == 4 else None, told_now)
        events = http.get(f"/v1/jobs/{job['id']}/events", params={"limit": 100}).json()["data"]
        last = http.get(f"/v1/jobs/{job['id']}").json()
    assert told.keys() == {"job.queued", "job.running", "job.checkpoint", "job.succeeded"}
    assert all(JobEvent.model_validate(said).data.id == job["id"] for said in told.values())
    found = {event["id"]: event for event in events}
    assert all(said["data"]["event_id"] in found for said in told.values())
    checkpoint = told["job.checkpoint"]["data"]
    assert checkpoint["checkpoint"] == found[checkpoint["event_id"]]["data"]
    assert told["job.succeeded"]["data"]["result"] == last["result"]
