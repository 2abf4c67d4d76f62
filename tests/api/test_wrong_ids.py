"""If an id is of the wrong kind, the error names its kind and the right one."""

from typing import Any

import httpx
import pytest

from tests.api.conftest import Filled
from worker.refusals import PREFIXES, Kind, not_found

IDS = {"job": "job_id", "dataset": "dataset_id", "checkpoint": "checkpoint_id", "webhook": "webhook_id"}

PATHS = {
    "job": [
        "jobs/{}",
        "jobs/{}/events",
        "jobs/{}/artifacts",
        "jobs/{}/artifacts/grid.png",
        "jobs/{}/metrics",
        "checkpoints?job={}",
        "jobs/{}/logs",
        "jobs/{}/attempts",
        "jobs?after={}",
    ],
    "dataset": ["datasets/{}", "datasets/{}/contact-sheet", "datasets?after={}"],
    "checkpoint": ["checkpoints/{}", "checkpoints/{}/download", "checkpoints?after={}"],
    "webhook": ["webhooks/{}", "webhooks/{}/deliveries", "webhooks?after={}"],
}


def test_ids_begin_as_their_kind_says(filled: Filled) -> None:
    for kind, prefix in PREFIXES.items():
        assert all(each.startswith(prefix) for each in filled.ids[IDS[kind]])


@pytest.mark.parametrize(
    ("wanted", "path", "given"),
    [(kind, path, other) for kind, paths in PATHS.items() for path in paths for other in IDS if other != kind],
)
def test_a_path_with_an_id_of_another_kind_says_so(wanted: Kind, path: str, given: Kind, filled: Filled) -> None:
    for given_id in (filled.ids[IDS[given]][0], PREFIXES[given] + "x"):
        response = filled.client.get(f"/v1/{path.format(given_id)}")
        problem = response.json()
        assert (response.status_code, problem["code"]) == (404, f"{wanted}_not_found")
        assert f"{given_id} is a {given}" in problem["detail"]
        assert f"a {wanted} ({PREFIXES[wanted]}" in problem["detail"]


@pytest.mark.parametrize(
    ("method", "path", "wanted", "given"),
    [
        ("DELETE", "jobs/{}", "job", "dataset"),
        ("POST", "jobs/{}/cancel", "job", "checkpoint"),
        ("POST", "jobs/{}/pause", "job", "webhook"),
        ("POST", "jobs/{}/resume", "job", "dataset"),
        ("DELETE", "datasets/{}", "dataset", "job"),
        ("DELETE", "checkpoints/{}", "checkpoint", "job"),
        ("DELETE", "webhooks/{}", "webhook", "dataset"),
        ("POST", "webhooks/{}/ping", "webhook", "job"),
    ],
)
def test_a_change_of_an_id_of_another_kind_says_so(
    method: str, path: str, wanted: str, given: str, filled: Filled
) -> None:
    given_id = filled.ids[IDS[given]][0]
    problem = filled.client.request(method, f"/v1/{path.format(given_id)}").json()
    assert (problem["code"], problem["status"]) == (f"{wanted}_not_found", 404)
    assert f"{given_id} is a {given}" in problem["detail"]


def test_a_request_for_a_job_with_an_id_of_another_kind_says_so(filled: Filled) -> None:
    job, dataset, checkpoint, webhook = (
        filled.ids[IDS[kind]][0] for kind in ("job", "dataset", "checkpoint", "webhook")
    )
    tiny = {"preset": "tiny"}
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("training", {"dataset": job, "model": tiny}, "dataset_not_found", f"{job} is a job"),
        ("training", {"dataset": checkpoint, "model": tiny}, "dataset_not_found", f"{checkpoint} is a checkpoint"),
        (
            "training",
            {"dataset": dataset, "model": tiny, "training": {"steps": 20, "batch_size": 8}, "resume_from": dataset},
            "checkpoint_not_found",
            f"{dataset} is a dataset",
        ),
        ("likelihood", {"model": dataset, "dataset": dataset}, "checkpoint_not_found", f"{dataset} is a dataset"),
        (
            "likelihood",
            {"model": checkpoint, "dataset": checkpoint},
            "dataset_not_found",
            f"{checkpoint} is a checkpoint",
        ),
        ("sampling", {"model": webhook}, "checkpoint_not_found", f"{webhook} is a webhook"),
        ("sampling", {"model": job}, "no_checkpoint", "only training jobs have checkpoints"),
        (
            "sampling",
            {"model": checkpoint, "between": {"dataset": job, "images": [0, 1]}},
            "dataset_not_found",
            f"{job} is a job",
        ),
    ]
    for kind, body, code, said in cases:
        problem = filled.client.post(f"/v1/{kind}-jobs", json=body).json()
        assert problem["code"] == code, problem
        assert said in problem["detail"]
        if code == "checkpoint_not_found":
            assert "a checkpoint (ckpt_...) or a job (job_...)" in problem["detail"]


def test_an_id_of_no_kind_or_of_the_right_one_is_only_not_there(lasting_http: httpx.Client) -> None:
    for job_id in ("job_0", "xyz", "JOB_0", "ds", "x" * 500):
        detail = lasting_http.get(f"/v1/jobs/{job_id}").json()["detail"]
        assert detail == f"there is no job {job_id[:64]}"
    assert str(not_found("dataset", "ds_0")) == "there is no dataset ds_0"
