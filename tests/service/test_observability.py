"""Logs as JSON, and traces, of one small life of the service: both tell which request and job they are about."""

import json
import signal
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.client import Client
from api.stack import Stack
from examples import photographs
from flowpp import logs
from flowpp.data import encode_png
from tests.collector import Collector, collecting
from tests.waiting import PATIENCE_SECONDS, until

REQUEST_ID = "a-request-of-mine"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MINE = {"X-Request-ID": REQUEST_ID, "traceparent": f"00-{TRACE}-{CALLER}-01"}
CONSUMER = 5
NOT_SENT = "traces are not sent"


@dataclass
class Life:
    """The spans, log lines by process, ids of requests, jobs and their log of one life, and the exit statuses."""

    collector: Collector
    lines: dict[str, list[dict[str, Any]]]
    request_ids: list[str]
    trained: dict[str, Any]
    log: list[str]
    scored: dict[str, Any]
    statuses: dict[str, int]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """A training job; then the collector is gone, and a likelihood job comes."""
    directory = tmp_path_factory.mktemp("life") / "data"
    files = [("file", (f"{i}.png", encode_png(image))) for i, image in enumerate(photographs.patches()[0][:12])]
    with pytest.MonkeyPatch.context() as environment, ExitStack() as cleanup:
        environment.setenv(logs.FORMAT, "json")
        environment.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # its own spans would hold queries
        collector = cleanup.enter_context(collecting(environment))
        stack = cleanup.enter_context(Stack(directory, port=0))
        http = cleanup.enter_context(httpx.Client(base_url=stack.url, trust_env=False, timeout=PATIENCE_SECONDS))
        client = cleanup.enter_context(Client(stack.url))
        dataset = http.post("/v1/datasets", files=files).json()["id"]
        body = {"dataset": dataset, "model": {"preset": "tiny"}, "training": {"steps": 2}}
        accepted = http.post("/v1/training-jobs", json=body, headers=MINE)
        job = accepted.json()["id"]
        assert client.jobs.wait(job, timeout=PATIENCE_SECONDS).status == "succeeded"
        log = [str(event.data["line"]) for event in client.jobs.events(job) if event.type == "log"]
        refused = http.get("/v1/jobs/job_none?key=s3cret", headers={"X-Request-ID": "no id, but a sentence"})
        for path in ("/healthz", "/readyz", "/metrics", "/no/such/path"):
            http.get(path)
        for name in ("training attempt", "GET /v1/jobs/{job_id}", "GET"):
            collector.until(lambda name=name: bool(collector.named(name)))
        collector.leave()
        upload = [("files", file[1]) for file in files[:1]]
        scored = http.post("/v1/likelihood-jobs", data={"model": job}, files=upload, headers={"Prefer": "wait=60"})
        for name in ("api", "inference"):
            path = directory / "logs" / f"{name}.log"
            until(lambda path=path: NOT_SENT in path.read_text(), path.read_text)
        processes = dict(stack.children)
        stack.stop()
        statuses = {name: process.returncode for name, process in processes.items()}
    lines = {name: lines_of(directory / "logs" / f"{name}.log") for name in ("api", "training", "inference")}
    ids = [answer.headers["X-Request-ID"] for answer in (accepted, refused)]
    return Life(collector, lines, ids, accepted.json(), log, scored.json(), statuses)


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert line.keys() >= {"time", "level", "logger", "message"}, line
    return lines


def test_a_request_is_found_in_the_lines_of_every_process_that_worked_for_it(life: Life) -> None:
    accepted, refused = life.request_ids
    assert accepted == REQUEST_ID
    assert refused not in ("", REQUEST_ID, "no id, but a sentence"), "what is no id is replaced by one"
    assert all(life.lines.values()), "each process said something"
    assert '"POST /v1/training-jobs HTTP/1.1" 202' in str([line["message"] for line in life.lines["api"]])
    about_job = [line for line in life.lines["training"] if line.get("job_id") == life.trained["id"]]
    assert {(line["request_id"], line["attempt"], line["trace_id"]) for line in about_job} == {(REQUEST_ID, 1, TRACE)}
    of_the_child = {line["message"] for line in about_job} & set(life.log)
    assert of_the_child, "the training process's own lines are among them, and among the job's"
    assert not any(message.startswith("{") for message in life.log), "people read those"


def test_one_trace_runs_from_the_caller_through_api_and_worker_into_the_training_process(life: Life) -> None:
    told = {span.name: span for span in life.collector.spans if span.trace == TRACE}
    post, attempt, run = told["POST /v1/training-jobs"], told["training attempt"], told["training run"]
    assert [post.parent, attempt.parent, run.parent] == [CALLER, post.id, attempt.id]
    assert [post.service, attempt.service, run.service] == ["flowpp-api", "flowpp-worker", "flowpp-training"]
    for name in ("evaluation", "samples", "checkpoint"):
        assert told[name].parent == run.id
        assert told[name].attributes["flowpp.step"] == 2
    assert not any(span.failed for span in told.values())


def test_a_request_is_told_by_its_route_and_not_by_its_query(life: Life) -> None:
    of_one = {"http.request.method": "GET", "url.path": "/v1/jobs/job_none", "http.route": "/v1/jobs/{job_id}"}
    of_one |= {"http.response.status_code": 422, "flowpp.request_id": life.request_ids[1]}
    assert of_one in [span.attributes for span in life.collector.named("GET /v1/jobs/{job_id}")]
    assert not any(b"s3cret" in body for body in life.collector.received)
    [nowhere] = life.collector.named("GET")
    assert nowhere.attributes["url.path"] == "/no/such/path", "and what programs ask every few seconds is not told:"
    asked = {span.attributes.get("url.path") for span in life.collector.spans}
    assert asked.isdisjoint({"/healthz", "/readyz", "/metrics"})


def test_an_attempt_tells_its_job_its_outcome_and_how_long_it_waited(life: Life) -> None:
    [attempt] = life.collector.named("training attempt")
    assert attempt.kind == CONSUMER
    assert 0 <= attempt.attributes["flowpp.job.queue_seconds"] < PATIENCE_SECONDS
    assert attempt.attributes == {
        "flowpp.job.id": life.trained["id"],
        "flowpp.job.type": "training",
        "flowpp.job.attempt": 1,
        "flowpp.job.outcome": "succeeded",
        "flowpp.job.queue_seconds": attempt.attributes["flowpp.job.queue_seconds"],
        "flowpp.request_id": REQUEST_ID,
    }
    assert "traceparent" not in life.trained, "it is the operator's"


def test_without_a_collector_jobs_end_as_ever_and_each_process_complains_once(life: Life) -> None:
    assert life.scored["status"] == "succeeded"
    complaints = {name: [line for line in lines if NOT_SENT in line["message"]] for name, lines in life.lines.items()}
    assert [len(complaints[name]) for name in ("api", "inference")] == [1, 1]
    assert {line["level"] for lines in complaints.values() for line in lines} == {"warning"}
    assert -signal.SIGKILL not in life.statuses.values(), "each ends in its grace period"
