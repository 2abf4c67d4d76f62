"""`Prefer`: what is read of it, and what an answer says of it."""

import threading
import time

import httpx
import pytest

from api import answers
from api.preferences import MAX_WAIT_SECONDS, Preferences
from tests.api.conftest import Serve
from tests.cost import cost
from tests.waiting import PATIENCE_SECONDS, until
from worker import finished
from worker.jobs import Progress
from worker.models import Checkpoint
from worker.service import Service

READ: list[tuple[list[str], Preferences]] = [
    ([], Preferences()),
    (["wait=10"], Preferences(False, 10)),
    (["respond-async, wait=10"], Preferences(True, 10)),
    (["respond-async", "wait=10"], Preferences(True, 10)),
    (["Respond-Async,WAIT=10"], Preferences(True, 10)),
    (['wait="10"'], Preferences(False, 10)),
    ([' , wait = 10 ; for="a, wait=3" ;, handling=lenient'], Preferences(False, 10)),
    (['return=minimal; foo="some \\"parameter, wait=3", wait=10'], Preferences(False, 10)),
    (["wait=10, wait=20", "wait=30"], Preferences(False, 10)),
    (["wait=61"], Preferences(False, 60)),
    (["wait=0"], Preferences(False, 0)),
    (["await=10, wait-not=10, respond-asynchronously"], Preferences()),
    (["wait", "wait=5"], Preferences()),
    (["wait=-1"], Preferences()),
    (["wait=1.5"], Preferences()),
    (["wait=soon, respond-async"], Preferences(True)),
    (['"broken, wait=10', "respond-async"], Preferences(True)),
]


@pytest.mark.parametrize(("headers", "preferences"), READ)
def test_preferences_are_read_as_rfc_7240_has_them(headers: list[str], preferences: Preferences) -> None:
    assert Preferences.of(headers) == preferences


@pytest.mark.parametrize(
    "header", ["a" + "; " * 30_000 + "(", 'a="' + '\\"' * 30_000, "a;" * 30_000 + "=", ", " * 30_000]
)
def test_no_header_takes_long_to_read(header: str) -> None:
    assert cost(lambda: Preferences.of([header])) < 1


def asked(http: httpx.Client, checkpoint: Checkpoint, *prefer: str) -> tuple[httpx.Response, float]:
    start = time.monotonic()
    headers = [("Prefer", value) for value in prefer]
    response = http.post("/v1/sampling-jobs", json={"model": checkpoint.id}, headers=headers)
    return response, time.monotonic() - start


def test_who_prefers_no_wait_is_answered_202_at_once(http: httpx.Client, checkpoint: Checkpoint) -> None:
    response, seconds = asked(http, checkpoint, "respond-async")
    assert (response.status_code, response.headers["preference-applied"]) == (202, "respond-async")
    assert seconds < MAX_WAIT_SECONDS
    assert response.headers["location"] == f"/v1/jobs/{response.json()['id']}"


def test_who_prefers_a_wait_and_then_an_asynchronous_answer_has_both(
    http: httpx.Client, checkpoint: Checkpoint
) -> None:
    response, seconds = asked(http, checkpoint, "respond-async", "wait=1")
    assert (response.status_code, response.headers["preference-applied"]) == (202, "respond-async, wait=1")
    assert seconds >= 1


def test_who_prefers_nothing_is_told_of_nothing(http: httpx.Client, checkpoint: Checkpoint) -> None:
    response, _ = asked(http, checkpoint)
    assert "preference-applied" not in response.headers


def test_a_wait_beyond_the_longest_is_taken_as_that(
    http: httpx.Client, service: Service, checkpoint: Checkpoint
) -> None:
    key = {"Idempotency-Key": "once"}
    job = http.post("/v1/sampling-jobs", json={"model": checkpoint.id}, headers=key).json()["id"]
    service.jobs.cancel(job)  # has finished, so that nothing is waited for
    response = http.post(
        "/v1/sampling-jobs", json={"model": checkpoint.id}, headers={**key, "Prefer": "respond-async, wait=90"}
    )
    assert (response.status_code, response.headers["preference-applied"]) == (200, "wait=60")


def test_a_lone_client_that_waits_hears_of_its_results_and_does_not_wait_for_a_look(
    service: Service, serve: Serve, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks here before the wait is over, so that word that is lost costs all of it."""
    monkeypatch.setattr(answers, "LOOK_SECONDS", 2 * MAX_WAIT_SECONDS)
    monkeypatch.setattr(finished, "_LISTEN_SECONDS", PATIENCE_SECONDS)
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.01):
            jobs = service.jobs.claim("inference", "a worker", 64)
            service.jobs.succeed([(job, {}, "", Progress.at(1, 1)) for job in jobs])

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with serve(service.settings) as http:
            until(lambda: dict(service.redis.pubsub_numsub(finished.CHANNEL))[finished.CHANNEL])
            for _ in range(60):
                response, seconds = asked(http, checkpoint, f"wait={MAX_WAIT_SECONDS}")
                assert (response.status_code, response.json()["status"]) == (200, "succeeded")
                assert seconds < MAX_WAIT_SECONDS
    finally:
        ended.set()
        worker.join()
