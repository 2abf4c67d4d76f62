"""Each error code is provoked: no refusal is documented that nothing can cause, and none goes untested."""

import ast
import asyncio
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image

from api.app import create_app
from api.client import Client, ProblemError
from api.errors import COMMAND_LINE, FAILURES, REFUSALS
from flowpp.data import BadImages, ImageSet, Limits, build_image_set, encode_png
from flowpp.presets import PRESETS
from flowpp.sources import read_latents
from tests.api.busy_server import Reply, busy_server
from worker.artifacts import ArtifactStore
from worker.backup import back_up
from worker.garbage import collect
from worker.models import Checkpoint
from worker.rebuilding import rebuild
from worker.refusals import Refusal
from worker.service import Service

ROOT = Path(__file__).parents[2]
PNG = encode_png(np.zeros((32, 32, 3), np.uint8))


def image(mode: str = "RGB", size: tuple[int, int] = (32, 32), kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def array(content: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, content, allow_pickle=True)
    return buffer.getvalue()


def zipped(*files: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return buffer.getvalue()


def link() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("a.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    return buffer.getvalue()


def pages() -> bytes:
    return image(kind="TIFF", save_all=True, append_images=[Image.new("RGB", (32, 32))])


FILES: dict[str, Callable[[], bytes]] = {
    "not_an_image": lambda: b"hello",
    "unsupported_format": lambda: image(kind="GIF"),
    "damaged_image": lambda: PNG[:-20],
    "animated_image": pages,
    "transparent_image": lambda: image("RGBA"),
    "unsupported_depth": lambda: image("I;16"),
    "unsupported_colour": lambda: image("CMYK", kind="JPEG"),
    "image_too_large": lambda: image(size=(257, 32)),
    "image_too_small": lambda: image(size=(1, 32)),
    "mixed_sizes": lambda: zipped(("a.png", PNG), ("b.png", image(size=(16, 16)))),
    "ambiguous_split": lambda: zipped(("train/a.png", PNG), ("val/b.png", PNG), ("c/d.png", PNG)),
    "unsupported_array": lambda: array(np.zeros((32, 32, 3), np.uint8)),
    "damaged_array": lambda: array(np.zeros((2, 32, 32, 3), np.uint8))[:-1],
    "damaged_batch": lambda: b"\x80\x02}q\x00.",
    "unsafe_pickle": lambda: b"\x80\x02cposix\nsystem\nU\x01x\x85R.",
    "damaged_archive": lambda: zipped(("a.png", PNG))[:-30],
    "unsafe_archive": link,
    "unsupported_archive": lambda: zipped(("a.png", PNG), compression=zipfile.ZIP_BZIP2),
    "nested_archive": lambda: zipped(("a.zip", zipped(("a.png", PNG)))),
    "too_large": lambda: zipped(("a.npy", array(np.zeros((40_000, 32, 32, 3), np.uint8)))),
    "too_many_images": lambda: array(np.zeros((0, 32, 32, 3), np.uint8)).replace(b"(0, 32", b"(9000000, 32"),
    "no_images": lambda: zipped(),
}
"""A file that is uploaded as a dataset, by the code of its refusal."""


class House(NamedTuple):
    """An API without workers, its service, and a checkpoint in it."""

    http: httpx.Client
    service: Service
    checkpoint: Checkpoint

    def dataset(self, count: int = 18, part: str = "images") -> str:
        content = zipped((f"{part}.npy", array(np.zeros((count, 32, 32, 3), np.uint8))))
        return str(self.http.post("/v1/datasets", files={"file": ("a.zip", content)}).json()["id"])

    def train(self, **changes: Any) -> httpx.Response:
        wanted = {"dataset": changes.pop("dataset", None) or self.dataset(), "model": {"preset": "tiny"}}
        return self.http.post("/v1/training-jobs", json={**wanted, **changes})

    def sample(self, **changes: Any) -> httpx.Response:
        return self.http.post("/v1/sampling-jobs", json={"model": self.checkpoint.id, **changes})

    def score(self, files: list[bytes], **fields: str) -> httpx.Response:
        sent = [("files", (f"{index}.png", content)) for index, content in enumerate(files)]
        return self.http.post("/v1/likelihood-jobs", data={"model": self.checkpoint.id, **fields}, files=sent)

    def job(self, action: str) -> httpx.Response:
        """An action on a sampling job that waits."""
        return self.http.post(f"/v1/jobs/{self.sample().json()['id']}/{action}")

    def in_use(self) -> httpx.Response:
        dataset = self.dataset()
        self.train(dataset=dataset)
        return self.http.delete(f"/v1/datasets/{dataset}")

    def of_a_cancelled_job(self) -> httpx.Response:
        job = self.sample().json()["id"]
        self.http.post(f"/v1/jobs/{job}/cancel")
        return self.http.post(f"/v1/jobs/{job}/cancel")

    def internal_error(self) -> httpx.Response:
        self.service.redis.set("flowpp:webhooks", "of another type")
        return self.http.get("/v1/webhooks")

    def queue_full(self) -> httpx.Response:
        answers = [self.sample() for _ in range(1 + self.service.settings.max_queued_inference)]
        return answers[-1]

    def reused(self) -> httpx.Response:
        headers = {"Idempotency-Key": "once"}
        answers = [
            self.http.post("/v1/sampling-jobs", json={"model": self.checkpoint.id, "seed": seed}, headers=headers)
            for seed in (1, 2)
        ]
        return answers[-1]

    def interpolation(self, **changes: Any) -> httpx.Response:
        return self.sample(between={"dataset": self.dataset(), "images": [0, 1]}, **changes)

    def ends(self, count: int) -> httpx.Response:
        files = [("files", (f"{index}.png", PNG)) for index in range(count)]
        return self.http.post("/v1/sampling-jobs", data={"model": self.checkpoint.id}, files=files)

    def webhook(self, url: str) -> httpx.Response:
        return self.http.post("/v1/webhooks", json={"url": url, "events": ["job.succeeded"]})


REQUESTS: dict[str, Callable[[House], httpx.Response]] = {
    "invalid_request": lambda house: house.sample(num_samples="many"),
    "unsupported_media_type": lambda house: house.http.post("/v1/datasets", content=b"x"),
    "method_not_allowed": lambda house: house.http.delete("/v1/jobs"),
    "not_found": lambda house: house.http.get("/v1/nothing"),
    "invalid_event_id": lambda house: house.http.get(
        f"/v1/jobs/{house.sample().json()['id']}/events", params={"after": "no id"}
    ),
    "idempotency_key_reused": House.reused,
    "job_not_found": lambda house: house.http.get("/v1/jobs/job_0"),
    "dataset_not_found": lambda house: house.http.get("/v1/datasets/ds_0"),
    "checkpoint_not_found": lambda house: house.http.get("/v1/checkpoints/ckpt_0"),
    "webhook_not_found": lambda house: house.http.get("/v1/webhooks/wh_0"),
    "artifact_not_found": lambda house: house.http.get(f"/v1/jobs/{house.sample().json()['id']}/artifacts/grid.png"),
    "job_finished": House.of_a_cancelled_job,
    "job_not_paused": lambda house: house.job("resume"),
    "not_pausable": lambda house: house.job("pause"),
    "no_checkpoint": lambda house: house.sample(model=house.train().json()["id"]),
    "in_use": House.in_use,
    "queue_full": House.queue_full,
    "invalid_configuration": lambda house: house.train(model={"preset": "tiny", "flow": ["squeeze"] * 6}),
    "no_training_images": lambda house: house.train(dataset=house.dataset(part="test")),
    "too_few_training_images": lambda house: house.train(dataset=house.dataset(3), training={"batch_size": 2}),
    "batch_larger_than_dataset": lambda house: house.train(training={"batch_size": 64}),
    "wrong_model": lambda house: house.train(
        model={"preset": "tiny", "filters": 16}, resume_from=house.checkpoint.id, training={"batch_size": 8}
    ),
    "wrong_image_shape": lambda house: house.score([image(size=(16, 16))]),
    "too_many_importance_samples": lambda house: house.score([PNG], importance_samples="65000"),
    "too_many_samples": lambda house: house.sample(num_samples=10**6),
    "too_few_samples": lambda house: house.interpolation(num_samples=1),
    "invalid_temperature": lambda house: house.interpolation(temperature=0.5),
    "wrong_ends": lambda house: house.ends(3),
    "no_such_image": lambda house: house.sample(between={"dataset": house.dataset(), "images": [0, 18]}),
    "unknown_preset": lambda house: house.http.post(
        "/v1/checkpoints", data={"preset": "tiny"}, files={"file": ("a.npz", b"x")}
    ),
    "bad_checkpoint": lambda house: house.http.post(
        "/v1/checkpoints", data={"preset": "cifar10"}, files={"file": ("a.npz", b"x")}
    ),
    "invalid_url": lambda house: house.webhook("ftp://example.com/"),
    "private_address": lambda house: house.webhook("https://10.0.0.1/"),
    "internal_error": House.internal_error,
}
"""A request by the code of its refusal."""


def bad_image_set(directory: Path) -> None:
    ImageSet.open(directory)


def too_many_entries(directory: Path) -> None:
    (directory / "a.zip").write_bytes(zipped(("a.png", PNG), ("b.png", PNG)))
    build_image_set(directory / "a.zip", directory / "set", limits=Limits(max_entries=1))


def decompression_bomb(directory: Path) -> None:
    (directory / "a.zip").write_bytes(zipped(("a.npy", array(np.zeros((5_600, 32, 32, 3), np.uint8)))))
    build_image_set(directory / "a.zip", directory / "set")


def too_many_files(directory: Path) -> None:
    (directory / "a.png").write_bytes(PNG)
    build_image_set(directory, directory.parent / "set", limits=Limits(max_images=0))


def unsafe_folder(directory: Path) -> None:
    (directory / "elsewhere").symlink_to("/etc")
    build_image_set(directory, directory.parent / "set")


def bad_latents(directory: Path) -> None:
    np.savez(directory / "a.npz", latents=np.zeros(3))
    read_latents(directory / "a.npz", PRESETS["tiny"].model)


COMMANDS: dict[str, Callable[[Path], object]] = {
    "no_such_file": lambda directory: build_image_set(directory / "nothing", directory / "set"),
    "unsafe_folder": unsafe_folder,
    "too_many_entries": too_many_entries,
    "decompression_bomb": decompression_bomb,
    "too_many_files": too_many_files,
    "bad_image_set": bad_image_set,
    "bad_latents": bad_latents,
    "empty_store": lambda directory: back_up(ArtifactStore(str(directory / "a")), ArtifactStore(str(directory / "b"))),
}
"""A call of a command, by the code of its failure."""


def emptied(service: Service) -> None:
    service.redis.flushdb()
    collect(service)


OF_A_SERVICE: dict[str, Callable[[Service], object]] = {
    "key_not_found": lambda service: service.keys.revoke("key_0"),
    "not_empty": rebuild,
    "not_indexed": emptied,
}

ELSEWHERE = {
    "body_too_large": "tests/api/test_hygiene.py",
    "body_too_slow": "tests/api/test_hygiene.py",
    "range_not_satisfiable": "tests/api/test_jobs.py",
    "idempotency_in_progress": "tests/api/test_idempotency.py",
    "unauthenticated": "tests/api/test_auth.py",
    "scope_missing": "tests/api/test_auth.py",
    "not_loopback": "tests/api/test_auth.py",
    "rate_limited": "tests/api/test_auth.py",
    "quota_exceeded": "tests/api/test_auth.py",
    "unresolvable_host": "tests/api/test_webhooks.py",
    "too_many_uploads": "tests/api/test_hygiene.py",
    "disk_full": "tests/api/test_hygiene.py",
    "artifact_damaged": "tests/api/test_damage.py",
    "store_unavailable": "tests/api/test_damage.py",
    "redis_unreachable": "tests/api/test_app.py",
    "out_of_memory": "tests/worker/test_service.py",
    "too_many_processes": "tests/worker/test_service.py",
    "worker_lost": "tests/worker/test_jobs.py",
    "nan_loss": "tests/flowpp/test_training.py",
    "diverged": "tests/worker/test_training.py",
    "not_finite": "tests/worker/test_inference.py",
    "bad_dataset": "tests/service/test_job_lives.py",
    "internal": "tests/worker/test_inference.py",
}
"""Tests of codes that need more than one request: a slow body, a full disk, a worker that dies."""


@pytest.fixture
def house(http: httpx.Client, service: Service, checkpoint: Checkpoint) -> House:
    return House(http, service, checkpoint)


@pytest.mark.parametrize("code", FILES)
def test_a_file_is_refused_with_the_code(code: str, lasting_http: httpx.Client) -> None:
    response = lasting_http.post("/v1/datasets", files={"file": ("a", FILES[code]())})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (REFUSALS[code].statuses[0], code), problem["detail"]


@pytest.mark.parametrize("code", REQUESTS)
def test_a_request_is_refused_with_the_code(code: str, house: House) -> None:
    response = REQUESTS[code](house)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (REFUSALS[code].statuses[0], code), problem["detail"]


@pytest.mark.parametrize("code", COMMANDS)
def test_a_command_fails_with_the_code(code: str, tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    with pytest.raises((BadImages, Refusal)) as caught:
        COMMANDS[code](tmp_path / "given")
    assert caught.value.code == code  # type: ignore[union-attr]  # both have one


@pytest.mark.parametrize("code", OF_A_SERVICE)
def test_an_operators_command_fails_with_the_code(code: str, service: Service, checkpoint: Checkpoint) -> None:
    with pytest.raises(Refusal) as caught:
        OF_A_SERVICE[code](service)
    assert caught.value.code == code


def test_an_answer_of_something_else_than_the_service_has_a_code() -> None:
    with (
        busy_server(Reply(502, b"<html>Bad Gateway</html>")) as (url, _),
        Client(url, max_retries=0) as client,
        pytest.raises(ProblemError) as caught,
    ):
        client.jobs.get("job_1")
    assert (caught.value.status, caught.value.code) == (502, "http_error")


def test_a_body_that_breaks_off_has_a_code(service: Service) -> None:
    """The application is called as a server calls it: a client that has gone reads no answer."""
    messages = [{"type": "http.request", "body": b"--b", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def call() -> None:
        app = create_app(service.settings)
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=b")]
        scope = {"type": "http", "method": "POST", "path": "/v1/datasets", "query_string": b"", "headers": headers}
        scope |= {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http", "raw_path": b""}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(call())
    body = json.loads(b"".join(message.get("body", b"") for message in sent))
    assert (sent[0]["status"], body["code"]) == (400, "disconnected")


def test_every_code_is_provoked() -> None:
    here = FILES.keys() | REQUESTS.keys() | COMMANDS.keys() | OF_A_SERVICE.keys() | {"http_error", "disconnected"}
    assert here | ELSEWHERE.keys() == REFUSALS.keys() | FAILURES.keys() | COMMAND_LINE.keys()
    assert not here & ELSEWHERE.keys()


@pytest.mark.parametrize("code", ELSEWHERE)
def test_a_code_that_is_tested_elsewhere_is_in_an_assertion_there(code: str) -> None:
    tree = ast.parse((ROOT / ELSEWHERE[code]).read_text())
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    said = {node.value for test in tests for node in ast.walk(test) if isinstance(node, ast.Constant)}
    assert code in said, f"no test of {ELSEWHERE[code]} names {code!r}"
