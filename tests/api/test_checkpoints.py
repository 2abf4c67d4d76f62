"""The authors' weights through HTTP."""

from pathlib import Path

import httpx
import numpy as np
import pytest

from api.client import Client
from flowpp.model import FlowPP
from flowpp.published import entries
from worker.service import Service


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of CIFAR-10's arrays, constant, so that 126 MB are few as a file."""
    arrays = {name: np.full(entry.shape, 0.5, np.float32) for entry in entries("cifar10") for name in entry.names}
    path = tmp_path_factory.mktemp("published") / "cifar10.npz"
    np.savez_compressed(path, **arrays)
    return path


def test_the_authors_file_becomes_a_checkpoint_that_loads(
    http: httpx.Client, service: Service, published: Path
) -> None:
    with Client(str(http.base_url)) as client:
        checkpoint = client.checkpoints.upload(published, "cifar10")
        assert checkpoint.validation_quantiles is None, "nobody has scored validation images with it"
        assert client.checkpoints.get(checkpoint.id) == checkpoint
    record = http.get(f"/v1/checkpoints/{checkpoint.id}").json()
    assert (record["step"], record["job"], record["model"]["filters"]) == (0, None, 96)
    model = FlowPP.load(service.checkpoints.fetch(service.checkpoints.get(checkpoint.id)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 31_443_440
    assert all((parameter == 0.5).all() for parameter in model.parameters())


def test_it_is_a_model_for_jobs(http: httpx.Client, published: Path) -> None:
    with published.open("rb") as file:
        response = http.post("/v1/checkpoints", data={"preset": "cifar10"}, files={"file": file})
    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/checkpoints/{response.json()['id']}"
    job = http.post("/v1/sampling-jobs", json={"model": response.json()["id"]})
    assert job.status_code == 202


def test_a_file_that_does_not_fit_is_refused_with_what_is_missing_and_left_over(
    http: httpx.Client, service: Service, tmp_path: Path
) -> None:
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with (tmp_path / "other.npz").open("rb") as file:
        response = http.post("/v1/checkpoints", data={"preset": "imagenet64"}, files={"file": file})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (422, "bad_checkpoint")
    assert "2,640 missing: " in problem["detail"]
    assert "1 left over: weights" in problem["detail"]
    assert problem["errors"][0]["path"] == "file"
    assert service.checkpoints.page().data == []


def test_a_preset_that_was_not_published_is_refused(http: httpx.Client) -> None:
    for fields, code in (({"preset": "small"}, "unknown_preset"), ({}, "invalid_request")):
        response = http.post("/v1/checkpoints", data=fields, files={"file": b"x"})
        assert (response.status_code, response.json()["code"]) == (422, code)
        assert response.json()["errors"][0]["path"] == "preset"
    assert response.json()["detail"] == "preset: Field required"
