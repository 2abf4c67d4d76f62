"""`Prefer`: what is read of it, and what an answer says of it."""

import time

import httpx
import pytest

from api.answers import LOOK_SECONDS
from api.client import Job
from api.preferences import Preferences
from api.stack import Stack
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
    start = time.monotonic()
    Preferences.of([header])
    assert time.monotonic() - start < 1


def asked(http: httpx.Client, checkpoint: Checkpoint, *prefer: str) -> tuple[httpx.Response, float]:
    start = time.monotonic()
    headers = [("Prefer", value) for value in prefer]
    response = http.post("/v1/sampling-jobs", json={"model": checkpoint.id}, headers=headers)
    return response, time.monotonic() - start


def test_who_prefers_no_wait_is_answered_202_at_once(http: httpx.Client, checkpoint: Checkpoint) -> None:
    response, seconds = asked(http, checkpoint, "respond-async")
    assert (response.status_code, response.headers["preference-applied"]) == (202, "respond-async")
    assert seconds < 1
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


def test_a_lone_client_that_waits_hears_of_its_results_and_does_not_wait_for_a_look(stack: Stack, trained: Job) -> None:
    """Word that is lost costs a whole `LOOK_SECONDS`; so may a request now and then on a machine that is busy."""
    seconds = []
    with httpx.Client(base_url=stack.url, headers={"Prefer": "wait=30"}, timeout=60) as http:
        for seed in range(63):
            start = time.monotonic()
            answer = http.post("/v1/sampling-jobs", json={"model": trained.id, "num_samples": 1, "seed": seed})
            seconds.append(time.monotonic() - start)
            assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    late = [each for each in seconds[3:] if each >= 0.9 * LOOK_SECONDS]  # the first load the model
    assert len(late) <= 2, seconds
