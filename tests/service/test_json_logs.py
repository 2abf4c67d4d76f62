"""Logs as JSON: every line of every process is an object, and tells which request and job it is about."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.client import Client
from api.stack import Stack
from examples import photographs
from flowpp import logs
from flowpp.data import encode_png

REQUEST_ID = "a-request-of-mine"


@pytest.mark.timeout(120)
def test_a_request_is_found_in_the_lines_of_every_process_that_worked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.FORMAT, "json")
    files = [("file", (f"{i}.png", encode_png(image))) for i, image in enumerate(photographs.patches()[0][:12])]
    with Stack(tmp_path / "data", port=0) as stack, httpx.Client(base_url=stack.url, trust_env=False) as http:
        dataset = http.post("/v1/datasets", files=files).json()["id"]
        body = {"dataset": dataset, "model": {"preset": "tiny"}, "training": {"steps": 2}}
        answer = http.post("/v1/training-jobs", json=body, headers={"X-Request-ID": REQUEST_ID})
        assert answer.headers["X-Request-ID"] == REQUEST_ID
        job = answer.json()["id"]
        with Client(stack.url) as client:
            assert client.jobs.wait(job, timeout=90).status == "succeeded"
            told = [str(event.data["line"]) for event in client.jobs.events(job) if event.type == "log"]
        refused = http.get("/v1/jobs/job_none", headers={"X-Request-ID": "no id, but a sentence"})
        assert refused.headers["X-Request-ID"] not in ("", REQUEST_ID), "what is no id is replaced by one"
    said = {name: lines_of(tmp_path / "data" / "logs" / f"{name}.log") for name in ("api", "training", "inference")}
    assert all(said.values()), "each process said something"
    assert '"POST /v1/training-jobs HTTP/1.1" 202' in str([line["message"] for line in said["api"]])
    about_job = [line for line in said["training"] if line.get("job_id") == job]
    assert {(line["request_id"], line["attempt"]) for line in about_job} == {(REQUEST_ID, 1)}
    of_the_child = {line["message"] for line in about_job} & set(told)
    assert of_the_child, "the training process's own lines are among them, and among the job's"
    assert not any(message.startswith("{") for message in told), "people read those"


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message"}, line
    return lines
