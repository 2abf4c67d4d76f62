"""Images that an owner uploads again are recognized by their content, and stored once."""

import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from flowpp.data import encode_png
from tests.api.conftest import Serve, low_limits
from tests.api.test_intake import files_below
from worker.garbage import collect
from worker.keys import NewKey, Quota
from worker.models import Checkpoint
from worker.rebuilding import rebuild
from worker.redis_server import RedisServer
from worker.requests import LikelihoodRequest
from worker.service import Service
from worker.submission import prepare_likelihood, submit_one

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)


def npy(pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zip_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, image in enumerate(pixels):
            archive.writestr(f"{index:03d}.png", encode_png(image))
    return buffer.getvalue()


def upload(http: httpx.Client, content: bytes, name: str = "a.npy", **headers: str) -> httpx.Response:
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return http.post("/v1/datasets", files={"file": (name, content)}, headers=headers)


def test_the_same_images_give_the_same_dataset(http: httpx.Client, service: Service) -> None:
    first = upload(http, npy())
    stored = files_below(service.settings.data_directory)
    again = upload(http, npy(), "other.npy")
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json(), "with the name that it has"
    assert again.headers["location"] == first.headers["location"]
    assert len(http.get("/v1/datasets").json()["data"]) == 1
    assert files_below(service.settings.data_directory) == stored


def test_other_files_of_the_same_pixels_give_it_too_and_other_splits_do_not(http: httpx.Client) -> None:
    known = upload(http, npy()).json()["id"]
    assert upload(http, zip_of(PIXELS), "a.zip").json()["id"] == known
    split = upload(http, npz(train=PIXELS[:8], validation=PIXELS[8:]), "a.npz")
    other = upload(http, npy(PIXELS[::-1].copy()))
    grey = upload(http, npy(PIXELS[..., 0].copy()))
    assert [each.status_code for each in (split, other, grey)] == [201] * 3
    assert len({known, *(each.json()["id"] for each in (split, other, grey))}) == 4


def test_a_deleted_dataset_is_not_given_again(http: httpx.Client) -> None:
    first = upload(http, npy())
    assert http.delete(first.headers["location"]).status_code == 204
    second = upload(http, npy())
    assert second.status_code == 201
    assert second.json()["id"] != first.json()["id"]
    assert http.get(second.headers["location"]).status_code == 200


def test_a_dataset_that_a_job_uses_is_given_and_deleted_only_after_it(
    http: httpx.Client, service: Service, checkpoint: Checkpoint
) -> None:
    known = upload(http, npy()).json()["id"]
    job = submit_one(service, prepare_likelihood(service, LikelihoodRequest(model=checkpoint.id, dataset=known)))
    assert upload(http, npy()).json()["id"] == known
    assert http.delete(f"/v1/datasets/{known}").json()["code"] == "in_use"
    http.post(f"/v1/jobs/{job.id}/cancel")
    assert http.delete(f"/v1/datasets/{known}").status_code == 204
    assert upload(http, npy()).status_code == 201


@pytest.mark.parametrize("damage", ["shorter", "changed", "missing", "no manifest"])
def test_a_damaged_dataset_is_replaced_and_the_new_one_given_from_then_on(
    damage: str, http: httpx.Client, service: Service
) -> None:
    known = upload(http, npy()).json()["id"]
    [file] = (Path(service.settings.store_url) / "datasets" / known).rglob("images.npy")
    if damage == "no manifest":
        file.parents[1].joinpath("manifest.json").unlink()
    elif damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + (b"" if damage == "shorter" else bytes([content[-1] ^ 1])))
    new = upload(http, npy())
    assert new.status_code == 201
    assert new.json()["id"] != known
    assert upload(http, npy()).json()["id"] == new.json()["id"]
    service.datasets.delete(known)
    assert upload(http, npy()).json()["id"] == new.json()["id"], "the older one is forgotten, and not the newer"


def test_an_idempotency_key_is_answered_with_the_dataset_that_was_given(http: httpx.Client) -> None:
    known = upload(http, npy()).json()
    given = upload(http, npy(), Idempotency_Key="k1")
    assert (given.status_code, given.json()) == (201, known)
    replayed = upload(http, npy(), Idempotency_Key="k1")
    assert (replayed.status_code, replayed.json()) == (201, known)
    assert replayed.headers["idempotency-replayed"] == "true"
    assert upload(http, npy(PIXELS[:5]), Idempotency_Key="k1").json()["code"] == "idempotency_key_reused"
    other = upload(http, npy(), Idempotency_Key="k2")
    assert (other.status_code, other.json()) == (201, known)


def test_equal_uploads_at_once_leave_datasets_that_are_whole(http: httpx.Client, service: Service) -> None:
    answers: list[httpx.Response] = []

    def send() -> None:
        with httpx.Client(base_url=http.base_url, trust_env=False, timeout=60) as client:
            answers.append(upload(client, npy()))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {201}
    ids = {answer.json()["id"] for answer in answers}
    assert ids == {dataset["id"] for dataset in http.get("/v1/datasets").json()["data"]}
    for dataset_id in ids:
        service.datasets.open(dataset_id).verify()
    assert upload(http, npy()).json()["id"] in ids


@pytest.fixture
def owners(
    serve: Serve, redis_server: RedisServer, tmp_path: Path
) -> Iterator[tuple[httpx.Client, Service, dict[str, str]]]:
    """A service with keys of two owners."""
    settings = low_limits(redis_server, tmp_path).model_copy(update={"authentication": True})
    with Service(settings) as service:
        service.redis.flushdb()
        tokens = {
            owner: service.keys.create(NewKey(owner=owner, scopes=("submit", "read"), quota=Quota(max_bytes=50_000)))[1]
            for owner in ("alice", "bob")
        }
        with serve(settings) as client:
            yield client, service, tokens


def test_another_owners_images_are_neither_given_nor_known(
    owners: tuple[httpx.Client, Service, dict[str, str]],
) -> None:
    http, _, tokens = owners
    mine = upload(http, npy(), Authorization=f"Bearer {tokens['alice']}")
    theirs = upload(http, npy(), Authorization=f"Bearer {tokens['bob']}")
    assert (mine.status_code, theirs.status_code) == (201, 201), "the same answer as if nobody had these images"
    assert mine.json()["id"] != theirs.json()["id"]
    assert theirs.json()["owner"] == "bob"
    assert upload(http, npy(), Authorization=f"Bearer {tokens['alice']}").json()["id"] == mine.json()["id"]


def test_the_quota_is_charged_once(owners: tuple[httpx.Client, Service, dict[str, str]]) -> None:
    http, service, tokens = owners
    bearer = f"Bearer {tokens['alice']}"
    size = upload(http, npy(), Authorization=bearer).json()["bytes"]
    for _ in range(3):
        assert upload(http, npy(), Authorization=bearer).json()["bytes"] == size
    assert service.redis.hgetall("flowpp:bytes") == {"alice": str(size)}


def test_a_rebuilt_service_recognizes_what_it_has(http: httpx.Client, service: Service) -> None:
    known = upload(http, npy()).json()["id"]
    service.redis.flushdb()
    rebuild(service)
    answer = upload(http, npy())
    assert answer.json()["id"] == known


def test_nothing_of_an_upload_that_was_not_needed_stays(http: httpx.Client, service: Service) -> None:
    upload(http, npy())
    upload(http, npy())
    assert collect(service, grace_seconds=-1) == []
