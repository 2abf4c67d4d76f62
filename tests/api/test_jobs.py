"""Jobs over HTTP, as far as no worker is needed: submission, lists, events, and what is refused."""

import hashlib
import json
import math
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from api.client import Client
from flowpp.data import build_image_set, encode_png
from tests.api.conftest import Serve
from tests.waiting import PATIENCE_SECONDS, until
from worker.datasets import Dataset
from worker.jobs import JobError, NewJob, Progress, new_job_id
from worker.models import Checkpoint
from worker.service import Service

PNG = encode_png(np.zeros((32, 32, 3), np.uint8))


def register(service: Service, directory: Path, shape: tuple[int, int, int] = (32, 32, 3)) -> Dataset:
    file = directory / "images.npy"
    np.save(file, np.zeros((18, *shape), np.uint8))
    return service.datasets.register(build_image_set(file, directory / "set"), "images.npy")


@pytest.fixture
def dataset(service: Service, tmp_path: Path) -> Dataset:
    return register(service, tmp_path)


def training(dataset: str, model: dict[str, Any] | None = None, recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"dataset": dataset, "model": {"preset": "tiny", **(model or {})}, "training": recipe or {}}


def test_a_training_job_is_accepted_and_found_where_its_location_says(http: httpx.Client, dataset: Dataset) -> None:
    response = http.post("/v1/training-jobs", json={**training(dataset.id), "metadata": {"who": "me"}})
    assert response.status_code == 202
    job = http.get(response.headers["location"]).json()
    assert (job["object"], job["type"], job["status"], job["attempt"]) == ("job", "training", "queued", 0)
    assert job["metadata"] == {"who": "me"}
    assert job["request"]["dataset"] == dataset.id
    assert not {"plan", "group", "size", "failures", "artifacts"} & job.keys(), "the service's own fields"


BAD_TRAINING: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"preset": "huge"}, {}, "model.preset", "cifar10, imagenet32"),
    ({"filters": -1}, {}, "model.filters", "greater than or equal to 1"),
    ({"filters": 10**9}, {}, "model.filters", "less than or equal to 512"),
    ({"filtres": 8}, {}, "model.filtres", "did you mean filters?"),
    ({"height": 32}, {}, "model.height", "no such field; there are bits, filters"),
    ({"heads": 3}, {}, "model", r"heads (3) must divide filters (8)"),
    ({"dequantizer": {"blocks": 65}}, {}, "model.dequantizer.blocks", "less than or equal to 64"),
    ({"flow": ["squeeze"] * 6}, {}, "model", "a squeeze needs an even height and width"),
    ({}, {"steps": 0}, "training.steps", "greater than or equal to 1"),
    ({}, {"steps": 10**12}, "training.steps", "less than or equal to"),
    ({}, {"learning_rate": math.nan}, "training.learning_rate", "finite"),
    ({}, {"learning_rate": -math.inf}, "training.learning_rate", ""),
    ({}, {"batch_size": -5}, "training.batch_size", "greater than or equal to 1"),
    ({}, {"steps": 5, "warmup_steps": 9}, "training", "exceed steps"),
]


@pytest.mark.parametrize(("model", "recipe", "path", "sentence"), BAD_TRAINING)
def test_a_configuration_that_cannot_be_is_refused_at_its_field(
    model: dict[str, Any], recipe: dict[str, Any], path: str, sentence: str, http: httpx.Client, dataset: Dataset
) -> None:
    body = json.dumps(training(dataset.id, model, recipe))  # json writes NaN, as careless clients do
    response = http.post("/v1/training-jobs", content=body, headers={"Content-Type": "application/json"})
    problem = response.json()
    assert response.status_code == 422
    assert problem["errors"][0]["path"] == path
    assert sentence in problem["errors"][0]["detail"]
    assert http.get("/v1/jobs").json()["data"] == []


def test_a_squeeze_that_does_not_divide_the_datasets_images_is_refused(
    http: httpx.Client, service: Service, tmp_path: Path
) -> None:
    dataset = register(service, tmp_path, (30, 30, 3))
    response = http.post("/v1/training-jobs", json=training(dataset.id, {"flow": ["squeeze", "squeeze"]}))
    assert (response.status_code, response.json()["code"]) == (422, "invalid_configuration")
    assert "15 x 15" in response.json()["detail"]


@pytest.mark.parametrize(
    ("preset", "shape", "sizes"),
    [
        ("small", (30, 30, 3), "widths that are multiples of 4 and heights that are multiples of 4"),
        ("small", (31, 31, 1), "widths that are multiples of 4 and heights that are multiples of 4"),
        ("tiny", (27, 28, 3), "widths that are multiples of 2 and heights that are multiples of 2"),
        ("imagenet64", (48, 52, 3), "widths that are multiples of 16 and heights that are multiples of 8"),
    ],
)
def test_a_preset_that_does_not_take_the_datasets_images_says_which_sizes_it_would(
    http: httpx.Client, service: Service, tmp_path: Path, preset: str, shape: tuple[int, int, int], sizes: str
) -> None:
    dataset = register(service, tmp_path, shape)
    response = http.post("/v1/training-jobs", json=training(dataset.id, {"preset": preset}))
    assert (response.status_code, response.json()["code"]) == (422, "invalid_configuration")
    assert response.json()["errors"][0]["path"] == "model"
    assert sizes in response.json()["detail"]


def test_a_batch_of_more_images_than_there_are_for_training_is_refused(
    http: httpx.Client, service: Service, dataset: Dataset
) -> None:
    most = dataset.num_training
    response = http.post("/v1/training-jobs", json=training(dataset.id, {}, {"batch_size": most + 1}))
    assert (response.status_code, response.json()["code"]) == (422, "batch_larger_than_dataset")
    assert response.json()["errors"][0]["path"] == "training.batch_size"
    assert f"choose {most} or less" in response.json()["detail"]
    assert http.post("/v1/training-jobs", json=training(dataset.id, {}, {"batch_size": most})).status_code == 202


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("training-jobs", training("ds_nothing"), 404, "dataset_not_found"),
        ("training-jobs", {}, 422, "invalid_request"),
        ("training-jobs", {**training("ds_nothing"), "extra": 1}, 422, "invalid_request"),
        ("likelihood-jobs", {"model": "ckpt_nothing", "dataset": "ds_nothing"}, 404, "checkpoint_not_found"),
        ("likelihood-jobs", {"model": "job_nothing", "dataset": "ds_nothing"}, 404, "job_not_found"),
        ("likelihood-jobs", {"model": "ckpt_nothing", "importance_samples": 0}, 422, "invalid_request"),
        ("sampling-jobs", {"model": "ckpt_nothing"}, 404, "checkpoint_not_found"),
        ("sampling-jobs", {"model": "ckpt_nothing", "num_samples": 1_000_000}, 422, "too_many_samples"),
        ("sampling-jobs", {"model": "ckpt_nothing", "num_samples": 0}, 422, "invalid_request"),
        ("sampling-jobs", {"model": "ckpt_nothing", "temperature": -1}, 422, "invalid_request"),
        ("sampling-jobs", {"model": "ckpt_nothing", "seed": -1}, 422, "invalid_request"),
    ],
)
def test_what_does_not_exist_or_is_absurd_is_refused(
    path: str, body: dict[str, Any], status: int, code: str, http: httpx.Client
) -> None:
    response = http.post(f"/v1/{path}", json=body)
    assert (response.status_code, response.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        ("training-jobs", {"datasets": "ds_1"}, "datasets", "no such field; did you mean dataset?"),
        (
            "training-jobs",
            {"priority": 1},
            "priority",
            "no such field; there are dataset, model, training, resume_from, metadata",
        ),
        (
            "training-jobs",
            training("ds_1", {}, {"learning_rat": 1}),
            "training.learning_rat",
            "no such field; did you mean learning_rate?",
        ),
        (
            "training-jobs",
            training("ds_1", {"dequantizer": {"blocs": 1}}),
            "model.dequantizer.blocs",
            "no such field; did you mean blocks?",
        ),
        ("likelihood-jobs", {"importance_sample": 2}, "importance_sample", "did you mean importance_samples?"),
        ("sampling-jobs", {"between": {"xyz": 1}}, "between.xyz", "no such field; there are dataset, images"),
        ("webhooks", {"uri": "http://127.0.0.1/"}, "uri", "no such field; did you mean url?"),
        ("webhooks", {"t" * 10_000: 1}, "t" * 100, "no such field; there are url, "),
    ],
)
def test_a_field_that_is_not_there_is_told_with_those_that_are(
    path: str, body: dict[str, Any], field: str, said: str, http: httpx.Client
) -> None:
    answer = http.post(f"/v1/{path}", json=body).json()
    assert answer["code"] == "invalid_request"
    told = {error["path"]: error["detail"] for error in answer["errors"]}
    assert said in told[field]
    assert all(len(detail) < 1_000 for detail in told.values())


def test_a_field_of_a_form_that_is_not_there_is_told_with_those_of_the_form(http: httpx.Client) -> None:
    answer = http.post("/v1/likelihood-jobs", data={"nothing": "1"}, files={"files": ("a.png", PNG)}).json()
    told = {error["path"]: error["detail"] for error in answer["errors"]}
    assert told["nothing"].startswith("no such field; there are ")
    assert "importance_samples" in told["nothing"]
    assert "dataset" not in told["nothing"]


@pytest.mark.parametrize("path", ["training-jobs", "likelihood-jobs", "sampling-jobs"])
def test_a_body_that_is_not_json_is_refused(path: str, http: httpx.Client) -> None:
    response = http.post(f"/v1/{path}", content=b'{"model": ', headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["path"] == "body"
    assert "not JSON" in response.json()["detail"]


def test_a_job_without_a_checkpoint_is_no_model_yet(http: httpx.Client, dataset: Dataset) -> None:
    job = http.post("/v1/training-jobs", json=training(dataset.id)).json()
    response = http.post("/v1/sampling-jobs", json={"model": job["id"]})
    assert (response.status_code, response.json()["code"]) == (409, "no_checkpoint")


def test_a_full_queue_answers_429_and_when_to_try_again(http: httpx.Client, checkpoint: Checkpoint) -> None:
    for _ in range(3):
        assert http.post("/v1/sampling-jobs", json={"model": checkpoint.id}).status_code == 202
    response = http.post("/v1/sampling-jobs", json={"model": checkpoint.id})
    assert (response.status_code, response.json()["code"]) == (429, "queue_full")
    assert int(response.headers["retry-after"]) > 0


def test_a_refused_likelihood_request_keeps_no_images(
    http: httpx.Client, service: Service, checkpoint: Checkpoint
) -> None:
    def send() -> int:
        return http.post(
            "/v1/likelihood-jobs", data={"model": checkpoint.id}, files=[("files", ("a.png", PNG))] * 6
        ).status_code

    assert [send() for _ in range(4)] == [202, 202, 202, 429]
    assert service.store.directory is not None
    assert len(list((service.store.directory / "jobs").iterdir())) == 3


def test_lists_come_in_pages(http: httpx.Client, dataset: Dataset) -> None:
    ids = [http.post("/v1/training-jobs", json=training(dataset.id)).json()["id"] for _ in range(5)]
    first = http.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == ids[:2:-1]
    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == ("list", ids[4], ids[3], True)
    rest = http.get("/v1/jobs", params={"limit": 100, "after": first["last_id"]}).json()
    assert [job["id"] for job in rest["data"]] == ids[2::-1]
    assert rest["has_more"] is False
    assert [job["id"] for job in http.get("/v1/jobs", params={"order": "asc"}).json()["data"]] == ids
    assert http.get("/v1/jobs", params={"after": "job_nothing"}).status_code == 404
    assert http.get("/v1/jobs", params={"limit": 101}).status_code == 422


@pytest.mark.parametrize("path", ["training-jobs", "webhooks", "sampling-jobs", "likelihood-jobs"])
def test_json_that_is_not_said_to_be_json_is_refused(path: str, http: httpx.Client) -> None:
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "text/json"}):
        response = http.post(f"/v1/{path}", content=b"{}", headers=headers)
        assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
        assert "application/json" in response.json()["detail"]
    said = http.post(f"/v1/{path}", content=b"{}", headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert said.json()["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("query", "name", "there_are"),
    [
        ("jobs?foo=bar&limit=3", "foo", "after, limit, order, type, status, metadata[key]"),
        ("jobs?metadata=pty", "metadata", "metadata[key]"),
        ("jobs?metadata[who=me", "metadata[who", "metadata[key]"),
        ("jobs?limit[who]=me", "limit[who]", "metadata[key]"),
        ("datasets?metadata[who]=me", "metadata[who]", "after, limit, order"),
        ("jobs/job_nowhere?full=1", "full", "none"),
        ("presets?name=tiny", "name", "none"),
    ],
)
def test_a_query_parameter_that_is_not_there_is_refused_with_those_that_are(
    http: httpx.Client, query: str, name: str, there_are: str
) -> None:
    response = http.get(f"/v1/{query}")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert [each["path"] for each in response.json()["errors"]] == [name]
    assert response.json()["detail"].endswith(there_are)


def test_the_filter_by_metadata_is_in_the_openapi_document(http: httpx.Client) -> None:
    parameters = http.get("/openapi.json").json()["paths"]["/v1/jobs"]["get"]["parameters"]
    (metadata,) = [each for each in parameters if each["name"] == "metadata"]
    assert (metadata["in"], metadata["style"]) == ("query", "deepObject")
    assert metadata["schema"] == {"type": "object", "additionalProperties": {"type": "string"}}


def test_jobs_are_found_by_type_status_and_metadata(
    http: httpx.Client, dataset: Dataset, checkpoint: Checkpoint
) -> None:
    mine = http.post("/v1/training-jobs", json={**training(dataset.id), "metadata": {"who": "me"}}).json()["id"]
    other = http.post("/v1/training-jobs", json={**training(dataset.id), "metadata": {"who": "you"}}).json()["id"]
    drawing = http.post("/v1/sampling-jobs", json={"model": checkpoint.id}).json()["id"]
    http.post(f"/v1/jobs/{other}/cancel")

    def found(**filters: str) -> list[str]:
        return [job["id"] for job in http.get("/v1/jobs", params=filters).json()["data"]]

    assert found(type="sampling") == [drawing]
    assert found(status="cancelled") == [other]
    assert found(**{"metadata[who]": "me"}) == [mine]
    assert http.get("/v1/jobs", params={"status": "dead"}).status_code == 422


def test_a_queued_job_is_cancelled_at_once_and_stays_so(http: httpx.Client, dataset: Dataset) -> None:
    job = http.post("/v1/training-jobs", json=training(dataset.id)).json()["id"]
    assert http.post(f"/v1/jobs/{job}/cancel").json()["status"] == "cancelled"
    for action in ("cancel", "pause", "resume"):
        response = http.post(f"/v1/jobs/{job}/{action}")
        assert (response.status_code, response.headers["content-type"]) == (409, "application/problem+json")
    assert http.delete(f"/v1/jobs/{job}").status_code == 204
    assert http.get(f"/v1/jobs/{job}").status_code == 404


def test_a_queued_training_job_can_be_paused_and_resumed(http: httpx.Client, dataset: Dataset) -> None:
    job = http.post("/v1/training-jobs", json=training(dataset.id)).json()["id"]
    for _ in range(2):
        assert http.post(f"/v1/jobs/{job}/pause").json()["status"] == "paused"
    for _ in range(2):
        response = http.post(f"/v1/jobs/{job}/resume")
        assert (response.status_code, response.json()["status"]) == (200, "queued")


def test_a_job_that_runs_is_cancelled_before_it_is_deleted(
    http: httpx.Client, service: Service, dataset: Dataset
) -> None:
    job = http.post("/v1/training-jobs", json=training(dataset.id)).json()["id"]
    [held] = service.jobs.claim("training", "a worker")
    for _ in range(2):
        response = http.delete(f"/v1/jobs/{job}")
        assert (response.status_code, response.json()["id"], response.json()["status"]) == (202, job, "cancelling")
    service.jobs.end(held, "stopped")
    until(lambda: http.get(f"/v1/jobs/{job}").status_code == 404)
    assert http.delete(f"/v1/jobs/{job}").status_code == 404


def test_a_dataset_that_a_job_needs_is_not_deleted(http: httpx.Client, dataset: Dataset) -> None:
    job = http.post("/v1/training-jobs", json=training(dataset.id)).json()["id"]
    assert http.delete(f"/v1/datasets/{dataset.id}").json()["code"] == "in_use"
    http.post(f"/v1/jobs/{job}/cancel")
    assert http.delete(f"/v1/datasets/{dataset.id}").status_code == 204


def test_prefer_wait_answers_202_when_the_time_is_over(http: httpx.Client, checkpoint: Checkpoint) -> None:
    start = time.monotonic()
    response = http.post("/v1/sampling-jobs", json={"model": checkpoint.id}, headers={"Prefer": "wait=1"})
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{response.json()['id']}"
    assert "retry-after" in response.headers
    assert time.monotonic() - start >= 1


def test_prefer_wait_answers_200_with_the_result_that_comes_in_time(
    http: httpx.Client, service: Service, checkpoint: Checkpoint
) -> None:
    def work() -> None:
        while not (claimed := service.jobs.claim("inference", "test")):
            time.sleep(0.02)
        service.jobs.end(claimed[0], "succeeded", result={"num_samples": 16})

    worker = threading.Thread(target=work)
    worker.start()
    response = http.post("/v1/sampling-jobs", json={"model": checkpoint.id}, headers={"Prefer": "wait=60"})
    worker.join()
    assert (response.status_code, response.json()["status"]) == (200, "succeeded")
    assert response.json()["result"] == {"num_samples": 16}


def run(service: Service, dataset: Dataset, http: httpx.Client) -> str:
    """A training job that a worker failed, having told metrics and a log line."""
    job_id = http.post("/v1/training-jobs", json=training(dataset.id)).json()["id"]
    (job,) = service.jobs.claim("training", "worker-1")
    for step, values in ((5, {"train_bits_per_dim": 6.0}), (10, {"validation_bits_per_dim": 5.5})):
        service.events.append(job, "metrics", {"step": step, **values})
    service.events.append(job, "log", {"line": "hello"})
    service.jobs.set_progress(job, Progress.at(10, 20))
    service.jobs.end(job, "failed", error=JobError(code="nan_loss", message="at step 11 the loss was nan"))
    return str(job_id)


def test_events_come_as_a_page(http: httpx.Client, service: Service, dataset: Dataset) -> None:
    job = run(service, dataset, http)
    page = http.get(f"/v1/jobs/{job}/events").json()
    kinds = [event["type"] for event in page["data"]]
    assert kinds == ["status", "status", "metrics", "metrics", "log", "status"]
    assert page["data"][-1]["data"]["status"] == "failed"
    rest = http.get(f"/v1/jobs/{job}/events", params={"after": page["data"][3]["id"], "limit": 1}).json()
    assert [event["id"] for event in rest["data"]] == [page["data"][4]["id"]]
    assert rest["has_more"] is True
    assert http.get(f"/v1/jobs/{job}/events", params={"after": "soon"}).json()["code"] == "invalid_event_id"


def test_events_are_read_backwards_and_by_type(http: httpx.Client, service: Service, dataset: Dataset) -> None:
    job = run(service, dataset, http)

    def asked(**parameters: Any) -> dict[str, Any]:
        answer = http.get(f"/v1/jobs/{job}/events", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    every = asked()["data"]
    assert asked(order="desc")["data"] == every[::-1]
    assert asked(order="desc", after=every[3]["id"])["data"] == every[2::-1]
    last = asked(order="desc", limit=1)
    assert (last["data"], last["has_more"]) == ([every[-1]], True)
    wanted = [event for event in every if event["type"] in ("log", "metrics")]
    assert asked(type="log,metrics")["data"] == asked(type=["log", "metrics"])["data"] == wanted
    assert asked(type=["log", "metrics"] * 20)["data"] == wanted
    page = asked(type="metrics", order="desc", limit=1)
    assert (page["data"], page["has_more"]) == ([wanted[1]], True)
    page = asked(type="metrics", order="desc", limit=1, after=page["last_id"])
    assert (page["data"], page["has_more"]) == ([wanted[0]], False)
    assert asked(type="checkpoint")["data"] == []
    refused = http.get(f"/v1/jobs/{job}/events", params={"type": "log,logs"}).json()
    assert (refused["code"], "'status', 'metrics', 'log'" in refused["detail"]) == ("invalid_request", True)


def test_a_stream_is_of_the_types_asked_for_and_goes_forward_only(
    http: httpx.Client, service: Service, dataset: Dataset
) -> None:
    job = run(service, dataset, http)
    every = http.get(f"/v1/jobs/{job}/events").json()["data"]
    assert stream(http, job, {"type": "log,metrics"}) == [e for e in every if e["type"] in ("log", "metrics")]
    backwards = {"order": "desc"}
    refused = http.get(f"/v1/jobs/{job}/events", params=backwards, headers={"Accept": "text/event-stream"})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    assert "goes forward" in refused.json()["detail"]
    assert refused.json()["errors"][0]["path"] == "order"


def stream(
    http: httpx.Client, job: str, parameters: dict[str, str] | None = None, **headers: str
) -> list[dict[str, Any]]:
    wanted = {"Accept": "text/event-stream", **headers}
    with http.stream("GET", f"/v1/jobs/{job}/events", params=parameters, headers=wanted) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines]


def test_a_stream_replays_from_the_first_event_or_behind_the_last_one_seen_and_ends(
    http: httpx.Client, service: Service, dataset: Dataset
) -> None:
    job = run(service, dataset, http)
    page = http.get(f"/v1/jobs/{job}/events").json()["data"]
    assert stream(http, job) == page
    assert stream(http, job, **{"Last-Event-ID": page[3]["id"]}) == page[4:]


def test_a_stream_is_live(http: httpx.Client, service: Service, dataset: Dataset) -> None:
    job_id = http.post("/v1/training-jobs", json=training(dataset.id)).json()["id"]
    seen: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: seen.extend(stream(http, job_id)))
    reader.start()
    (job,) = service.jobs.claim("training", "worker-1")
    service.events.append(job, "log", {"line": "hello"})
    service.jobs.end(job, "succeeded")
    reader.join(PATIENCE_SECONDS)
    assert [event["type"] for event in seen] == ["status", "status", "log", "status"]


def test_a_stream_outlives_a_silence_by_heartbeats_that_no_client_mistakes_for_events(
    http: httpx.Client, service: Service, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.jobs.HEARTBEAT_SECONDS", 1)
    job_id = http.post("/v1/training-jobs", json=training(dataset.id)).json()["id"]
    (job,) = service.jobs.claim("training", "worker-1")
    timer = threading.Timer(7, service.jobs.end, (job, "succeeded"))  # longer than one read of the stream blocks
    timer.start()
    with Client(str(http.base_url)) as client:
        seen = list(client.jobs.events(job_id))
    timer.join()
    assert [event.data["status"] for event in seen] == ["queued", "running", "succeeded"]


def test_metrics_come_as_columns(http: httpx.Client, service: Service, dataset: Dataset) -> None:
    columns = http.get(f"/v1/jobs/{run(service, dataset, http)}/metrics").json()["columns"]
    assert columns["step"] == [5, 10]
    assert columns["train_bits_per_dim"] == [6.0, None]
    assert columns["validation_bits_per_dim"] == [None, 5.5]


def test_logs_progress_attempts_and_the_error_are_told(http: httpx.Client, service: Service, dataset: Dataset) -> None:
    job = run(service, dataset, http)
    assert http.get(f"/v1/jobs/{job}/logs").text == "hello\n"
    (attempt,) = http.get(f"/v1/jobs/{job}/attempts").json()["data"]
    assert (attempt["attempt"], attempt["worker"], attempt["status"]) == (1, "worker-1", "failed")
    assert attempt["code"] == "nan_loss"
    assert attempt["ended_at"] >= attempt["started_at"]
    record = http.get(f"/v1/jobs/{job}").json()
    assert record["error"] == {"code": "nan_loss", "message": "at step 11 the loss was nan"}
    assert record["progress"] == {"step": 10, "total_steps": 20, "percent_done": 50, "estimated_finish_at": None}


def test_artifacts_are_listed_and_served_with_type_etag_and_range(
    http: httpx.Client, service: Service, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    job_id = http.post("/v1/sampling-jobs", json={"model": checkpoint.id}).json()["id"]
    assert http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"] == []
    (job,) = service.jobs.claim("inference", "worker-1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grid.png").write_bytes(PNG)
    service.store.put(f"jobs/{job_id}/output", tmp_path / "out")
    service.jobs.end(job, "succeeded", artifacts=f"jobs/{job_id}/output")

    (artifact,) = http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]
    assert (artifact["name"], artifact["bytes"]) == ("grid.png", len(PNG))
    response = http.get(artifact["url"])
    assert (response.content, response.headers["content-type"]) == (PNG, "image/png")
    assert response.headers["etag"] == f'"{artifact["sha256"]}"'
    assert http.get(artifact["url"], headers={"If-None-Match": response.headers["etag"]}).status_code == 304
    part = http.get(artifact["url"], headers={"Range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"PNG")
    head = http.head(artifact["url"], headers={"Range": "bytes=1-3"})
    assert (head.status_code, head.content) == (200, b"")
    for header in ("etag", "content-length", "content-type", "accept-ranges"):
        assert head.headers[header] == response.headers[header]
    assert "HEAD" in http.put(artifact["url"]).headers["allow"]
    for name in ("grid.jpg", "%2e%2e/manifest.json", "manifest.json", "..%2f..%2f..%2fetc%2fpasswd"):
        assert http.get(f"/v1/jobs/{job_id}/artifacts/{name}").status_code == 404


@pytest.mark.parametrize(
    ("wanted", "status", "content"),
    [
        ({}, 200, PNG),
        ({"Range": "bytes=1-3"}, 206, PNG[1:4]),
        ({"Range": "bytes=4-"}, 206, PNG[4:]),
        ({"Range": "bytes=-5"}, 206, PNG[-5:]),
        ({"Range": "bytes=0-9999999"}, 206, PNG),
        ({"Range": "bytes=0-0,4-5"}, 200, PNG),
        ({"Range": "bytes=1-3", "If-Range": '"another"'}, 200, PNG),
        ({"Range": "bytes=9999999-"}, 416, None),
    ],
)
def test_parts_of_files_of_a_remote_store_are_served(
    service: Service, serve: Serve, tmp_path: Path, wanted: dict[str, str], status: int, content: bytes | None
) -> None:
    remote = service.settings.model_copy(update={"store": f"memory://{tmp_path.name}"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grid.png").write_bytes(PNG)
    with Service(remote) as far, serve(remote) as http:
        job, _ = far.jobs.submit(NewJob(new_job_id(), "sampling", {}, {}, {}, ()), 10)
        far.store.put(f"jobs/{job.id}/output", tmp_path / "out")
        far.jobs.end(far.jobs.claim("inference", "worker-1")[0], "succeeded", artifacts=f"jobs/{job.id}/output")
        response = http.get(f"/v1/jobs/{job.id}/artifacts/grid.png", headers=wanted)
        head = http.head(f"/v1/jobs/{job.id}/artifacts/grid.png", headers=wanted)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(PNG))
    assert head.headers["etag"] == f'"{hashlib.sha256(PNG).hexdigest()}"'
    assert response.status_code == status
    if content is None:
        assert response.json()["code"] == "range_not_satisfiable"
        assert response.headers["content-range"] == f"bytes */{len(PNG)}"
    else:
        assert response.content == content
        assert int(response.headers["content-length"]) == len(content)
        assert ("content-range" in response.headers) == (status == 206)


def test_a_checkpoint_is_deleted_unless_a_job_needs_it(
    http: httpx.Client, service: Service, checkpoint: Checkpoint
) -> None:
    job = http.post("/v1/sampling-jobs", json={"model": checkpoint.id}).json()["id"]
    refused = http.delete(f"/v1/checkpoints/{checkpoint.id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "in_use")
    http.post(f"/v1/jobs/{job}/cancel")
    assert http.delete(f"/v1/checkpoints/{checkpoint.id}").status_code == 204
    assert http.get(f"/v1/checkpoints/{checkpoint.id}").status_code == 404
    assert service.store.directory is not None
    assert not (service.store.directory / checkpoint.prefix).exists()


def test_a_checkpoint_is_listed_and_downloaded_as_a_zip_that_loads(
    http: httpx.Client, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import io
    import zipfile

    from flowpp import FlowPP

    assert [one["id"] for one in http.get("/v1/checkpoints").json()["data"]] == [checkpoint.id]
    assert http.get(f"/v1/checkpoints/{checkpoint.id}").json()["model"]["filters"] == 8
    download = http.get(f"/v1/checkpoints/{checkpoint.id}/download")
    assert download.headers["content-type"] == "application/zip"
    assert download.headers["last-modified"] == formatdate(checkpoint.created_at, usegmt=True)
    head = http.head(f"/v1/checkpoints/{checkpoint.id}/download")
    assert (head.status_code, head.content) == (200, b"")
    for header in ("etag", "content-length", "last-modified"):
        assert head.headers[header] == download.headers[header]
    zipfile.ZipFile(io.BytesIO(download.content)).extractall(tmp_path / "taken")
    assert FlowPP.load(tmp_path / "taken" / checkpoint.id).config == checkpoint.model
    assert http.get("/v1/checkpoints/ckpt_nothing/download").json()["code"] == "checkpoint_not_found"


def test_an_interpolation_has_two_ends_that_exist_and_no_temperature(
    http: httpx.Client, checkpoint: Checkpoint, dataset: Dataset
) -> None:
    def refused(**changes: Any) -> str:
        body = {"model": checkpoint.id, "between": {"dataset": dataset.id, "images": [0, 1]}, **changes}
        response = http.post("/v1/sampling-jobs", json=body)
        assert response.status_code == 422
        path: str = response.json()["errors"][0]["path"]
        return path

    assert refused(between={"dataset": dataset.id, "images": [0, 10**6]}) == "between.images"
    assert refused(between={"dataset": dataset.id, "images": [0, -1]}) == "between.images.1"
    assert refused(between={"dataset": dataset.id, "images": [0]}) == "between.images.1"
    assert refused(num_samples=1) == "num_samples"
    assert refused(temperature=0.5) == "temperature"
    files = [("files", ("a.png", encode_png(np.zeros((32, 32, 3), np.uint8))))] * 3
    response = http.post("/v1/sampling-jobs", data={"model": checkpoint.id}, files=files)
    assert response.json()["errors"][0]["path"] == "files"


@pytest.mark.parametrize(
    ("images", "recipe", "sentence"),
    [
        (1, {"batch_size": 1}, "a new model needs at least 4 training images; there are 1"),
        (3, {"batch_size": 1}, "a new model needs at least 4 training images; there are 3"),
        (4, {"batch_size": 1}, None),
        (9, {"batch_size": 1, "init_batch_size": 2}, "a new model needs an init_batch_size of at least 4; it is 2"),
        (9, {"batch_size": 1, "init_batch_size": 4}, None),
    ],
)
def test_a_training_of_too_few_images_is_refused_with_the_number_needed(
    http: httpx.Client, service: Service, tmp_path: Path, images: int, recipe: dict[str, Any], sentence: str | None
) -> None:
    np.save(tmp_path / "few.npy", np.zeros((images, 8, 8, 3), np.uint8))
    few = service.datasets.register(
        build_image_set(tmp_path / "few.npy", tmp_path / "few", validation_fraction=0), "few.npy"
    )
    response = http.post("/v1/training-jobs", json=training(few.id, {}, recipe))
    if sentence is None:
        assert response.status_code == 202
    else:
        assert (response.status_code, response.json()["code"]) == (422, "too_few_training_images")
        assert sentence in response.json()["detail"]
        assert few.id in response.json()["detail"]
