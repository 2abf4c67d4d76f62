"""Requests that are sent again, against a real server that is busy."""

import json
import logging
import re
import subprocess
import sys
from email.utils import formatdate
from pathlib import Path
from time import time

import pytest

from api.client import AsyncClient, Client, ProblemError, Unreachable
from tests.api.busy_server import DATASET, JOB, Reply, busy_server

PROBLEM = json.dumps({"status": 429, "code": "rate_limited", "detail": "try again in 1 s"}).encode()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again_when_it_says(status: int) -> None:
    busy = Reply(status, PROBLEM, {"Retry-After": "1"})
    with busy_server(busy, Reply()) as (url, sent), Client(url) as client:
        assert client.jobs.get("job_1").id == "job_1"
    assert len(sent) == 2
    assert sent[1].at - sent[0].at >= 1


def test_the_caller_is_told_of_each_wait_that_the_service_asks_for(capfd: pytest.CaptureFixture[str]) -> None:
    busy, waits = Reply(429, PROBLEM, {"Retry-After": "1"}), list[float]()
    with busy_server(busy, busy, Reply()) as (url, _), Client(url, on_wait=waits.append) as client:
        client.jobs.get("job_1")
    with busy_server(busy, Reply()) as (url, _), Client(url) as client:
        client.jobs.get("job_1")
    assert waits == [1, 1]
    assert capfd.readouterr() == ("", ""), "the client prints nothing"


def test_retry_after_may_be_a_date() -> None:
    busy = Reply(503, PROBLEM, {"Retry-After": formatdate(time() + 6, usegmt=True)})
    waits: list[float] = []
    with busy_server(busy, Reply()) as (url, sent), Client(url, on_wait=waits.append) as client:
        client.jobs.get("job_1")
    assert len(sent) == 2
    assert 0 < waits[0] <= 6
    assert sent[1].at - sent[0].at >= 0.9 * waits[0]


def test_a_service_that_stays_busy_is_asked_so_often_and_no_more() -> None:
    with (
        busy_server(Reply(429, PROBLEM)) as (url, sent),
        Client(url, max_retries=2) as client,
        pytest.raises(ProblemError, match=r"try again in 1 s \(rate_limited\)"),
    ):
        client.jobs.get("job_1")
    assert len(sent) == 3
    assert sent[2].at - sent[1].at > 0.5, "the pauses grow"


def test_a_service_that_wants_an_hour_is_not_waited_for() -> None:
    busy = Reply(429, PROBLEM, {"Retry-After": "3600"})
    with busy_server(busy) as (url, sent), Client(url) as client, pytest.raises(ProblemError):
        client.jobs.get("job_1")
    assert len(sent) == 1


def test_other_refusals_are_not_sent_again() -> None:
    problem = json.dumps({"status": 422, "code": "invalid", "detail": "no"}).encode()
    with busy_server(Reply(422, problem)) as (url, sent), Client(url) as client, pytest.raises(ProblemError):
        client.jobs.cancel("job_1")
    assert len(sent) == 1


def test_a_creation_is_sent_again_with_the_same_key_after_a_break_and_while_the_first_is_at_work() -> None:
    at_work = Reply(409, json.dumps({"status": 409, "code": "idempotency_in_progress", "detail": "wait"}).encode())
    with busy_server(Reply(breaks=True), at_work, Reply(202)) as (url, sent), Client(url) as client:
        client.training_jobs.create(dataset="ds_1", model={"preset": "tiny"})
        client.training_jobs.create(dataset="ds_1", model={"preset": "tiny"})
    keys = [request.headers["idempotency-key"] for request in sent]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert keys[3] != keys[2], "each call creates its own"
    assert len({request.body for request in sent}) == 1


def test_a_wait_outlives_a_service_that_is_away_for_a_while_but_not_one_that_never_was() -> None:
    away, done = Reply(503, PROBLEM), Reply(200, JOB.replace(b"queued", b"succeeded"))
    with busy_server(Reply(), away, away, away, done) as (url, sent), Client(url, max_retries=0) as client:
        assert client.jobs.wait("job_1").status == "succeeded"
    assert len(sent) == 5
    with busy_server(away) as (url, sent), Client(url, max_retries=0) as client, pytest.raises(ProblemError):
        client.jobs.wait("job_1")
    assert len(sent) == 1


def test_a_wait_outlives_broken_connections() -> None:
    broken, done = Reply(breaks=True), Reply(200, JOB.replace(b"queued", b"succeeded"))
    with busy_server(Reply(), broken, broken, done) as (url, sent), Client(url, max_retries=0) as client:
        assert client.jobs.wait("job_1").status == "succeeded"
    assert len(sent) == 4


def test_what_may_not_happen_twice_is_not_sent_again_after_a_break() -> None:
    with busy_server(Reply(breaks=True), Reply()) as (url, sent), Client(url) as client:
        with pytest.raises(Unreachable):
            client.jobs.resume("job_1")
        client.jobs.get("job_1")
    assert [request.method for request in sent] == ["POST", "GET"]


def test_a_file_is_sent_again_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"images" * 50_000)
    busy = Reply(503, PROBLEM)
    reports: list[tuple[int, int]] = []
    with busy_server(busy, Reply(breaks=True), Reply(201, DATASET)) as (url, sent), Client(url) as client:
        client.datasets.upload(tmp_path / "images.zip", lambda done, total: reports.append((done, total)))
    assert [request.body.count(b"images" * 50_000) for request in sent] == [1, 1, 1]
    assert reports[-1] == (300_000, 300_000)


def test_waiting_metadata_and_an_end_by_then_are_said_in_each_creation() -> None:
    said = {"metadata": {"who": "me"}, "wait": 7, "cancel_after": 90}
    with busy_server(Reply(202)) as (url, sent), Client(url) as client:
        client.training_jobs.create(dataset="ds_1", model={"preset": "tiny"}, **said)
        client.sampling_jobs.create(model="job_1", **said)
        client.likelihood_jobs.create(model="job_1", dataset="ds_1", **said)
        client.likelihood_jobs.create(model="job_1", images=[("a.png", b"a")], **said)
        client.sampling_jobs.interpolate(model="job_1", images=[("a.png", b"a"), ("b.png", b"b")], **said)
    for request in sent:
        assert (request.headers["prefer"], request.headers["cancel-after"]) == ("wait=7", "90")
    assert [json.loads(request.body)["metadata"] for request in sent[:3]] == [{"who": "me"}] * 3
    assert all(b'name="metadata[who]"' in request.body for request in sent[3:])


def test_an_end_by_then_may_have_units_as_in_the_header() -> None:
    with busy_server(Reply(202)) as (url, sent), Client(url) as client:
        client.sampling_jobs.create(model="job_1", cancel_after="1h30m")
    assert sent[0].headers["cancel-after"] == "1h30m"


def test_the_key_is_sent_and_seen_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FLOWPP_API_KEY", "flowpp_secret")
    caplog.set_level(logging.DEBUG)
    with busy_server(Reply(401, PROBLEM)) as (url, sent):
        monkeypatch.setenv("FLOWPP_URL", url)
        with Client() as client, pytest.raises(ProblemError) as caught:
            client.jobs.get("job_1")
        told = f"{client!r} {client.__dict__} {vars(client._transport)} {caught.value!r} {caught.value} {caplog.text}"
    assert sent[0].headers["authorization"] == "Bearer flowpp_secret"
    assert "secret" not in told
    with pytest.raises(ValueError, match=r"FLOWPP_API_KEY\) has spaces") as refused:
        Client(url, key="flowpp_secret\n")
    assert "secret" not in str(refused.value)


def test_an_id_leads_nowhere_else_whatever_it_holds() -> None:
    with busy_server(Reply()) as (url, sent), Client(url) as client:
        client.jobs.get("job_1/cancel?limit=1#x")
        client.checkpoints.delete("a b/../c")
    assert [request.path for request in sent] == [
        "/v1/jobs/job_1%2Fcancel%3Flimit%3D1%23x",
        "/v1/checkpoints/a%20b%2F..%2Fc",
    ]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("localhost:8000", "did you mean http://localhost:8000?"),
        ("127.0.0.1:8000/", "did you mean http://127.0.0.1:8000/?"),
        ("nonsense", "did you mean http://nonsense?"),
        ("ftp://example.test", "they look like http://127.0.0.1:8000"),
        ("http://", "they look like"),
        ("http:///v1", "they look like"),
        ("http://127.0.0.1:99999", "ports are from 1 to 65535"),
        ("http://127.0.0.1:0", "ports are from 1 to 65535"),
        ("http://127.0.0.1:8 0", "Invalid port"),
        ("http://127.0.0.1:8000?x=1", "it ends with the port"),
        ("http://127.0.0.1:8000/#x", "it ends with the port"),
        *((url, "FLOWPP_URL") for url in ("http://[::1", "http://a..b", "http://xn--a", "http://a:b:c")),
        *((url, "FLOWPP_URL") for url in ("http://" + "a" * 64, "http://a\x01")),
    ],
)
def test_what_is_no_url_is_refused(url: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is no url") as refused:
        Client(url)
    assert sentence in str(refused.value)
    assert "FLOWPP_URL" in str(refused.value) or "ends with the port" in str(refused.value)
    monkeypatch.setenv("FLOWPP_URL", url)
    for client in (Client, AsyncClient):
        with pytest.raises(ValueError, match=re.escape(str(refused.value))):
            client()


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match="no user and password") as refused:
        Client("http://alice:hunter2@127.0.0.1:8000")
    assert "hunter2" not in str(refused.value)


def test_both_clients_read_the_environment_and_arguments_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWPP_URL", "http://127.0.0.1:8123")
    monkeypatch.setenv("FLOWPP_API_KEY", "flowpp_environment")
    for client in (Client, AsyncClient):
        assert client().url == "http://127.0.0.1:8123"
        assert client("http://127.0.0.1:8124/").url == "http://127.0.0.1:8124"
    with busy_server(Reply()) as (url, sent), Client(url) as own, Client(url, key="flowpp_argument") as other:
        own.jobs.get("job_1")
        other.jobs.get("job_1")
    keys = [request.headers["authorization"] for request in sent]
    assert keys == ["Bearer flowpp_environment", "Bearer flowpp_argument"]
    monkeypatch.delenv("FLOWPP_URL")
    assert Client().url == "http://127.0.0.1:8000"


def test_the_client_needs_nothing_else_of_this_repository() -> None:
    loaded = "import sys, api.client; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "worker", "flowpp", "fastapi", "redis"} & set(eval(run.stdout))
    assert "httpx" in run.stdout


def test_a_refusal_says_each_thing_once() -> None:
    one = ProblemError(422, "invalid_request", "steps: must be more", [{"path": "steps", "detail": "must be more"}])
    assert str(one) == "steps: must be more (invalid_request)"
    two = ProblemError(422, "invalid_request", "a: bad", [{"path": "a", "detail": "bad"}, {"path": "b", "detail": "x"}])
    assert str(two) == "a: bad (invalid_request)\n  b: x"
