"""Request ids: the caller's or a new one, in the answer, in problems, and with the job that a request creates."""

import re

import httpx
import pytest

from tests.api.conftest import Serve
from worker.models import Checkpoint
from worker.service import Service

MADE = re.compile(r"[0-9a-f]{16}")
TOKEN = f"flowpp_{'a' * 24}_{'s' * 43}"


def id_of(answer: httpx.Response) -> str:
    return str(answer.headers["x-request-id"])


def test_each_answer_names_its_request(http: httpx.Client) -> None:
    made = {id_of(http.get(path)) for path in ("/healthz", "/v1/jobs", "/v1/jobs/none", "/nothing")}
    assert len(made) == 4
    assert all(MADE.fullmatch(each) for each in made)
    assert id_of(http.get("/healthz", headers={"X-Request-ID": "batch-7.retry_2"})) == "batch-7.retry_2"


@pytest.mark.parametrize("given", ["", "with space", "x" * 129, 'quote"', "{}", TOKEN])
def test_what_is_no_id_or_a_key_is_replaced(http: httpx.Client, given: str) -> None:
    answer = http.get("/v1/jobs/none", headers={"X-Request-ID": given})
    assert MADE.fullmatch(id_of(answer))
    assert answer.json()["request_id"] == id_of(answer)


def test_a_problem_and_a_failure_name_their_request(
    service: Service, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("api.routes.presets.Preset", fail)
    with serve(service.settings) as http:
        for path, status in (("/v1/jobs/none", 404), ("/v1/presets", 500)):
            answer = http.get(path, headers={"X-Request-ID": "mine"})
            assert (answer.status_code, answer.json()["request_id"], id_of(answer)) == (status, "mine", "mine")
        assert "under mine" in answer.json()["detail"]


def test_a_job_keeps_the_id_of_the_request_that_asked_for_it(
    service: Service, http: httpx.Client, checkpoint: Checkpoint
) -> None:
    wanted = {"model": checkpoint.id, "num_samples": 1}
    made = http.post("/v1/sampling-jobs", json=wanted, headers={"X-Request-ID": "mine"}).json()
    job = service.jobs.get(made["id"])
    assert job.subject == {"request_id": "mine", "job_id": job.id, "attempt": 0, "trace_id": ""}
    assert "request_id" not in made, "it is the operator's"
