"""`flowpp gc`: what nothing refers to goes, and nothing else does."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from flowpp.data import build_image_set
from tests.s3 import S3
from tests.worker.conftest import Submit
from worker.garbage import collect
from worker.keys import NewKey
from worker.rebuilding import rebuild
from worker.recorder import Recorder, place
from worker.refusals import Conflict
from worker.service import Service
from worker.settings import Settings


@pytest.fixture(params=["directory", "s3"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """Of the services of this module: over a directory, and over S3."""
    if request.param == "s3":
        return settings.model_copy(update={"store": request.getfixturevalue("s3").new_store()})
    return settings


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_bytes(b"first")
    return tmp_path / "source"


def names(service: Service) -> set[str]:
    return {f"{folder}/{file.name}" for folder in ("jobs", "keys", "datasets", "checkpoints", "checks")
            for file in service.store.listing(folder)}  # fmt: skip


def fill(service: Service, submit: Submit, tmp_path: Path) -> None:
    """A key, a dataset, a job that waits and one that has ended, all with their records."""
    service.keys.create(NewKey(owner="alice"))
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    service.datasets.register(build_image_set(tmp_path / "images.npy", tmp_path / "image_set"))
    submit("sampling")
    (job,) = service.jobs.claim("inference", "a")
    service.store.put(f"jobs/{job.id}/attempt-1", tmp_path / "source", {})
    service.jobs.end(job, "succeeded", artifacts=f"jobs/{job.id}/attempt-1")
    waiting = submit()
    service.store.put(f"jobs/{waiting.id}/input", tmp_path / "source", {})
    Recorder(service).record()


def test_what_nothing_refers_to_is_deleted_and_all_else_stays(
    service: Service, submit: Submit, source: Path, tmp_path: Path
) -> None:
    fill(service, submit, tmp_path)
    kept = names(service)
    job = service.jobs.page(status="succeeded").data[0]
    garbage = [
        "datasets/ds_gone",
        "checkpoints/ckpt_gone",
        "jobs/job_gone/attempt-1",
        f"jobs/{job.id}/attempt-0",
        f"jobs/{job.id}/record-12345",  # of an older version
    ]
    for prefix in garbage:
        service.store.put(prefix, source)
    garbage.append(place(job.id, "12345"))
    service.store.put_record(garbage[-1], {"of": job.id})
    service.store._put_bytes(b"", service.store._path("checks", "left"))
    assert collect(service) == []  # they are new
    would = collect(service, grace_seconds=0, dry_run=True)
    assert names(service) > kept
    time.sleep(0.01)
    found = collect(service, grace_seconds=0)
    assert found == would
    assert {each.name for each in found} == {
        *(prefix.replace("/job_gone/attempt-1", "/job_gone") for prefix in garbage),
        "checks/left",
    }
    assert all(each.bytes > 5 for each in found if each.name != "checks/left")
    assert names(service) == kept
    assert collect(service, grace_seconds=0) == []


def test_nothing_is_deleted_where_redis_is_empty(
    service: Service, submit: Submit, source: Path, tmp_path: Path
) -> None:
    fill(service, submit, tmp_path)
    kept = names(service)
    service.redis.flushall()
    with pytest.raises(Conflict, match="flowpp reindex"):
        collect(service, grace_seconds=0)
    service.redis.set("flowpp:rebuilding", "1")
    service.redis.zadd("flowpp:keys", {"key_1": 1})  # of a rebuilding that was interrupted
    with pytest.raises(Conflict, match="flowpp reindex"):
        collect(service, grace_seconds=0)
    rebuild(service)
    assert collect(service, grace_seconds=0) == []
    assert names(service) == kept


def test_an_empty_store_has_no_garbage(service: Service) -> None:
    assert collect(service, grace_seconds=0) == []


def test_copies_and_run_directories_of_what_is_gone_are_deleted(
    service: Service, submit: Submit, source: Path, tmp_path: Path
) -> None:
    fill(service, submit, tmp_path)
    data, (dataset,) = service.settings.data_directory, service.datasets.page().data
    waiting, ended = service.jobs.page(status="queued").data[0], service.jobs.page(status="succeeded").data[0]
    for folder in (
        f"cache/datasets/{dataset.id}",
        "cache/datasets/ds_gone",
        f"runs/{waiting.id}/1",
        f"runs/{ended.id}/1",
        "runs/job_gone/1",
    ):
        (data / folder).mkdir(parents=True)
        (data / folder / "a").write_bytes(b"first")
    assert collect(service) == []
    time.sleep(0.01)
    found = {Path(each.name).name: each.bytes for each in collect(service, grace_seconds=0)}
    assert found == {"ds_gone": 5, ended.id: 5, "job_gone": 5}
    assert [path.name for path in (data / "runs").iterdir()] == [waiting.id]
    assert [path.name for path in (data / "cache" / "datasets").iterdir()] == [dataset.id]


def test_what_a_killed_process_was_writing_is_deleted(
    service: Service, submit: Submit, source: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fill(service, submit, tmp_path)
    kept, (dataset,) = names(service), service.datasets.page().data
    if service.store.directory is None:
        s3: S3 = request.getfixturevalue("s3")
        url = service.settings.store
        s3.client.create_multipart_upload(Bucket=url.split("/")[2], Key=f"folder/datasets/{dataset.id}/large")
        s3.client.create_multipart_upload(Bucket=url.split("/")[2], Key="another folder/large")
        time.sleep(1)
        (found,) = collect(service, grace_seconds=0)
        assert found.name == f"parts of datasets/{dataset.id}/large"
        assert s3.uploads(url) == ["another folder/large"]
    else:
        left = service.store.directory / "datasets" / dataset.id / ".a.txt.0123abcd.tmp"
        left.write_bytes(b"half")
        os.utime(left, (0, 0))
        (found,) = collect(service)
        assert (found.name, found.bytes) == (f"datasets/{dataset.id}/{left.name}", 4)
    assert names(service) == kept
