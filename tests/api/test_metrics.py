"""Metrics over HTTP: of requests, of the service, of workers, and who may read them."""

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.client import Job
from api.stack import Stack
from tests.api.conftest import Serve
from worker.keys import NewKey, Scope
from worker.models import Checkpoint
from worker.requests import SamplingRequest
from worker.service import Service
from worker.submission import prepare_sampling, submit_one

REQUESTS = "flowpp_request_duration_seconds_count"


def read(response: httpx.Response) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Values by name and labels."""
    assert response.status_code == 200, response.text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(http: httpx.Client, name: str, **labels: str) -> float:
    return read(http.get("/metrics")).get((name, frozenset(labels.items())), 0)


@pytest.mark.parametrize(
    ("method", "path", "labels"),
    [
        (
            "GET",
            "/v1/jobs/job_1/events?limit=3",
            {"method": "GET", "route": "/v1/jobs/{job_id}/events", "status": "404"},
        ),
        ("GET", "/v1/jobs", {"method": "GET", "route": "/v1/jobs", "status": "200"}),
        ("GET", "/healthz", {"method": "GET", "route": "/healthz", "status": "200"}),
        ("GET", "/v1/no/such/path", {"method": "GET", "route": "none", "status": "404"}),
        ("PUT", "/v1/jobs/job_1", {"method": "PUT", "route": "/v1/jobs/{job_id}", "status": "405"}),
        ("PROPFIND", "/v1/jobs/job_1", {"method": "other", "route": "/v1/jobs/{job_id}", "status": "405"}),
        (
            "GET",
            "/v1/jobs/job_1/artifacts/samples/a.png",
            {"method": "GET", "route": "/v1/jobs/{job_id}/artifacts/{name}", "status": "404"},
        ),
    ],
)
def test_requests_are_counted_by_the_template_of_their_route(
    http: httpx.Client, method: str, path: str, labels: dict[str, str]
) -> None:
    before = value(http, REQUESTS, **labels)
    http.request(method, path)
    http.request(method, path)
    assert value(http, REQUESTS, **labels) - before == 2
    assert value(http, "flowpp_request_duration_seconds_bucket", le="+Inf", **labels) - before == 2


def test_paths_and_methods_that_are_made_up_add_no_series(http: httpx.Client) -> None:
    made_up = ("PROPFIND", "MKCOL", "REPORT")
    for index, method in enumerate(made_up):
        http.get(f"/nothing/{index}")
        assert http.request(method, f"/v1/jobs/{index}").status_code == 405
    told = [dict(labels) for name, labels in read(http.get("/metrics")) if name == REQUESTS]
    methods = {labels["method"] for labels in told}
    assert "other" in methods
    assert not methods & set(made_up)
    assert methods <= {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "other"}, "whoever asked before"
    assert not [labels for labels in told if "nothing" in labels["route"]]


def test_a_request_that_fails_is_counted_as_500(
    service: Service, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    labels = {"method": "GET", "route": "/v1/presets", "status": "500"}
    monkeypatch.setattr("api.routes.presets.Preset", fail)
    with serve(service.settings) as http:
        before = value(http, REQUESTS, **labels)
        refused = http.get("/v1/presets", headers={"Connection": "close"})  # as uvicorn does then
        assert refused.status_code == 500
        assert value(http, REQUESTS, **labels) - before == 1


def test_the_service_is_told_of(service: Service, http: httpx.Client, checkpoint: Checkpoint) -> None:
    submit_one(service, prepare_sampling(service, SamplingRequest(model=checkpoint.id)))
    assert value(http, "flowpp_queue_jobs", queue="inference") == 1
    assert value(http, "flowpp_jobs", type="sampling", status="queued") == 1
    assert value(http, "flowpp_workers", queue="training") == 0
    assert value(http, "flowpp_redis_up") == 1


def test_with_authentication_only_an_admin_key_reads_metrics(service: Service, serve: Serve) -> None:
    def token(scope: Scope) -> str:
        return service.keys.create(NewKey(owner="alice", scopes=(scope,)))[1]

    with serve(service.settings.model_copy(update={"authentication": True})) as http:
        for headers, status, code in (
            ({}, 401, "unauthenticated"),
            ({"Authorization": f"Bearer {token('submit')}"}, 403, "scope_missing"),
        ):
            refused = http.get("/metrics", headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (status, code)
        answer = http.get("/metrics", headers={"Authorization": f"Bearer {token('admin')}"})
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "flowpp_redis_up 1.0" in answer.text


def test_without_authentication_metrics_are_read_over_loopback_only(http: httpx.Client) -> None:
    for headers in ({"Host": "flowpp.example.org"}, {"X-Forwarded-For": "203.0.113.7"}):
        assert http.get("/metrics", headers=headers).status_code == 403


def test_workers_serve_what_they_have_done(stack: Stack, trained: Job, metrics_port: int) -> None:
    told = {
        queue: read(httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False))
        for queue, port in (("training", metrics_port), ("inference", metrics_port + 1))
    }
    succeeded = frozenset({("type", "training"), ("outcome", "succeeded")})
    assert told["training"]["flowpp_attempt_duration_seconds_count", succeeded] >= 1
    assert told["training"]["flowpp_images_total", frozenset({("type", "training")})] >= 20 * 8
    assert ("flowpp_process_resident_memory_bytes", frozenset()) in told["inference"]
    with httpx.Client(base_url=stack.url, trust_env=False) as http:
        assert value(http, "flowpp_workers", queue="training") == 1
        assert value(http, "flowpp_jobs", type="training", status="succeeded") >= 1
