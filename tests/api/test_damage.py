"""Files that were damaged in the store are not served, on a directory and on S3: one flipped byte is enough."""

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flowpp.checkpoint import MODEL
from tests.api.conftest import Serve
from tests.s3 import S3, running_s3
from worker.jobs import NewJob, new_job_id
from worker.service import Service
from worker.settings import Settings

LARGE = 17 * 2**20


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as s3:
        yield s3


@pytest.fixture(params=["directory", "s3"])
def settings(request: pytest.FixtureRequest, service: Service) -> Settings:
    store = request.getfixturevalue("s3").new_store() if request.param == "s3" else ""
    return service.settings.model_copy(update={"store": store})


def flip(service: Service, name: str) -> None:
    """The byte in the middle of a stored file."""
    path = f"{service.store._root}/{name}"
    content = bytearray(service.store._fs.cat_file(path))
    content[len(content) // 2] ^= 1
    service.store._fs.pipe_file(path, bytes(content))


def leave(service: Service, source: Path) -> str:
    """The id of a job that has left the files of a directory."""
    job, _ = service.jobs.submit(NewJob(new_job_id(), "sampling", {}, {}, {}, ()), 10)
    place = f"jobs/{job.id}/output"
    service.store.put(place, source)
    service.jobs.end(service.jobs.claim("inference", "a")[0], "succeeded", artifacts=place)
    return job.id


def test_a_damaged_artifact_is_not_served(settings: Settings, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_bytes(b"content")
    with Service(settings) as service, serve(settings) as http:
        place = f"/v1/jobs/{(job := leave(service, tmp_path / 'out'))}/artifacts/a.txt"
        assert http.get(place).content == b"content"
        flip(service, f"jobs/{job}/output/a.txt")
        answer = http.get(place)
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")
    assert f"jobs/{job}/output/a.txt" in answer.json()["detail"]


def test_no_client_takes_a_large_damaged_artifact_for_whole(
    settings: Settings, serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "large").write_bytes(bytes(LARGE))
    with Service(settings) as service, serve(settings) as http:
        place = f"/v1/jobs/{(job := leave(service, tmp_path / 'out'))}/artifacts/large"
        assert http.get(place).content == bytes(LARGE)
        flip(service, f"jobs/{job}/output/large")
        with caplog.at_level(logging.ERROR):
            if service.store.directory is None:
                with pytest.raises(httpx.RemoteProtocolError):  # the connection is broken off
                    http.get(place)
            else:
                assert http.get(place).json()["code"] == "artifact_damaged"
        part = http.get(place, headers={"Range": "bytes=0-9"})
    assert f"jobs/{job}/output/large" in caplog.text
    assert part.status_code == (206 if service.store.directory is None else 500)


def test_a_damaged_checkpoint_is_not_served(settings: Settings, serve: Serve, saved_model: Path) -> None:
    with Service(settings) as service, serve(settings) as http:
        checkpoint = service.checkpoints.register(saved_model)
        flip(service, f"{checkpoint.prefix}/checkpoint/{MODEL}")
        answer = http.get(f"/v1/checkpoints/{checkpoint.id}/download")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_damaged")


def test_a_store_that_is_away_is_said_to_be(
    s3: S3, service: Service, serve: Serve, saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = service.settings.model_copy(update={"store": s3.new_store()})
    with Service(settings) as far:
        checkpoint = far.checkpoints.register(saved_model)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with serve(settings) as http:
        answer = http.get(f"/v1/checkpoints/{checkpoint.id}/download")
        ready = http.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "5"
    assert ready.status_code == 503
