"""Bodies that are odd, slow, large or many, and answers that no browser can be made to run."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from api import intake
from api.stack import Stack
from flowpp.data import encode_png
from tests.api.conftest import Serve
from tests.api.served import await_answer
from tests.api.test_intake import files_below
from tests.waiting import PATIENCE_SECONDS, until
from worker import child
from worker.jobs import NewJob, new_job_id
from worker.redis_server import HOST, free_port
from worker.service import Service

PNG = encode_png(np.zeros((32, 32, 3), np.uint8))
POSTS = ["training-jobs", "likelihood-jobs", "sampling-jobs"]
JSON = {"Content-Type": "application/json"}

ODD_BODIES = {
    "nested without end": b'{"model":' + b"[" * 60_000,
    "nested within a field": b'{"model": "m", "dataset": "d", "metadata": ' + b'{"a":' * 9_000 + b"1" + b"}" * 9_001,
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "UTF-16 without an end": '{"model": "m"'.encode("utf-16"),
    "an integer of 60,000 digits": b'{"model": "m", "seed": ' + b"9" * 60_000 + b"}",
    "NaN": b'{"model": NaN}',
    "infinity": b'{"model": "m", "seed": -Infinity}',
    "a lone surrogate": b'{"model": "\\ud800", "dataset": "\\udfff"}',
    "a lone surrogate as a name": b'{"\\ud800": 1}',
    "a NUL": b'{"model": "\\u0000", "dataset": "\\u0000", "metadata": {"\\u0000": "\\u0000"}}',
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "another encoding": '{"model": "ü"}'.encode("latin-1"),
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("kind", ODD_BODIES)
def test_an_odd_json_body_is_refused_in_words(path: str, kind: str, lasting_http: httpx.Client) -> None:
    response = lasting_http.post(f"/v1/{path}", content=ODD_BODIES[kind], headers=JSON)
    assert response.status_code in (404, 422), response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["detail"]


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=b", "text/plain"])
@pytest.mark.parametrize("path", POSTS)
def test_a_body_without_files_is_refused_beyond_64_kib(
    path: str, content_type: str, lasting_http: httpx.Client
) -> None:
    body = json.dumps({"model": "m" * 70_000}).encode()
    response = lasting_http.post(f"/v1/{path}", content=body, headers={"Content-Type": content_type})
    if "multipart" in content_type and path != "training-jobs":
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    else:
        assert response.status_code in (413, 415)
        assert response.json()["code"] in ("body_too_large", "unsupported_media_type")


def test_a_chunked_json_body_is_refused_beyond_64_kib(http: httpx.Client) -> None:
    def body() -> Iterator[bytes]:
        yield from (b" " * 2**12 for _ in range(100))

    response = http.post("/v1/training-jobs", content=body(), headers=JSON)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json; charset=utf-8", 404),
        ("Application/JSON", 404),
        ("application/json;;;", 404),
        ("application/jsonp", 415),
        ("", 415),
        ("multipart/form-data; boundary=", 422),
        ("multipart/form-data; boundary=\"'\x80", 422),
    ],
)
def test_a_media_type_is_heard_with_its_parameters(content_type: str, status: int, http: httpx.Client) -> None:
    body = b'{"model": "ckpt_0", "num_samples": 1}'
    headers = {"Content-Type": content_type.encode("latin-1")}
    assert http.post("/v1/sampling-jobs", content=body, headers=headers).status_code == status


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/%00",
        "/v1/jobs/%ff%fe",
        "/v1/jobs/job_0%2fevents",
        "/v1/jobs/%ed%a0%80",
        "/v1/jobs?after=%00",
        "/v1/jobs?after=%ed%a0%80",
        "/v1/jobs?after=a&after=b",
        "/v1/jobs?metadata[%00]=%00",
        "/v1/jobs?limit=99999999999999999999999999",
        "/v1/jobs?limit=1&limit=2",
        "/v1/checkpoints?job=%00",
        "/v1/datasets?order=asc&order=%ff",
    ],
)
def test_an_odd_path_or_query_is_answered_in_words(path: str, lasting_http: httpx.Client) -> None:
    response = lasting_http.get(path)
    assert response.status_code in (200, 404, 422), response.text
    assert response.json()


@pytest.mark.parametrize("header", ["Prefer", "Idempotency-Key", "Last-Event-ID", "Accept", "Range", "If-None-Match"])
@pytest.mark.parametrize("value", [b"\xff\xfe", b"\x80" * 8000, b'"', b"wait=" + b"9" * 500, b",,,;;;=="])
def test_an_odd_header_is_answered_in_words(header: str, value: bytes, http: httpx.Client, service: Service) -> None:
    job = queued(service)
    for path in ("events", "artifacts/a.png"):
        assert http.get(f"/v1/jobs/{job}/{path}", headers={header: value}).status_code in (200, 404, 422)
    created = http.post("/v1/sampling-jobs", json={"model": "ckpt_0"}, headers={header: value})
    assert created.status_code in (404, 422)


def queued(service: Service, **files: bytes) -> str:
    """The id of a job; with files, it has ended and left them."""
    job, _ = service.jobs.submit(NewJob(new_job_id(), "sampling", {}, {}, {}, ()), 100)
    if files:
        directory = service.settings.data_directory / job.id
        directory.mkdir(parents=True)
        for name, content in files.items():
            (directory / name.replace("_", ".")).write_bytes(content)
        prefix = f"jobs/{job.id}/output"
        service.store.put(prefix, directory)
        (held,) = [held for held in service.jobs.claim("inference", "w", 100) if held.id == job.id]
        service.jobs.end(held, "succeeded", artifacts=prefix)
    return job.id


def test_other_methods_are_refused_with_those_that_there_are(http: httpx.Client) -> None:
    for path, allowed in (
        ("/v1/jobs/job_0", "DELETE, GET, HEAD"),
        ("/v1/datasets", "GET, HEAD, POST"),
        ("/v1/presets", "GET, HEAD"),
    ):
        response = http.request("PATCH", path)
        assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
        assert response.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("wanted", "status", "content"),
    [
        ("bytes=1-3", 206, b"123"),
        ("bytes=-2", 206, b"89"),
        ("bytes=8-", 206, b"89"),
        ("bytes=0-0,4-5", 200, b"0123456789"),
        ("bytes=5-2", 200, b"0123456789"),
        ("bytes=-", 200, b"0123456789"),
        ("pages=1-2", 200, b"0123456789"),
        ("nonsense", 200, b"0123456789"),
        ("bytes=10-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
def test_a_range_is_heard_or_passed_over(
    wanted: str, status: int, content: bytes | None, http: httpx.Client, service: Service
) -> None:
    job = queued(service, a_bin=b"0123456789")
    response = http.get(f"/v1/jobs/{job}/artifacts/a.bin", headers={"Range": wanted})
    assert response.status_code == status
    if content is None:
        assert response.json()["code"] == "range_not_satisfiable"
    else:
        assert response.content == content


def test_no_browser_runs_what_a_job_has_left(http: httpx.Client, service: Service) -> None:
    job = queued(service, a_html=b"<script>alert(1)</script>", a_svg=b"<svg onload='alert(1)'/>")
    for path in ("/v1/jobs", f"/v1/jobs/{job}/artifacts/a.html", f"/v1/jobs/{job}/artifacts/a.svg", "/v1/nothing"):
        headers = http.get(path, headers={"Origin": "http://localhost:3000"}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in headers["content-security-policy"]
        assert not [name for name in headers if name.startswith("access-control-")]
    for path in ("/docs", "/openapi.json", "/healthz"):
        headers = http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"] == "frame-ancestors 'none'"


def test_the_stack_does_not_say_what_serves_it(stack: Stack) -> None:
    assert "server" not in httpx.get(f"{stack.url}/healthz", trust_env=False).headers


def test_a_body_that_stops_coming_is_given_up(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    monkeypatch.setattr(intake, "SLOW_SECONDS", 0.5)
    host, port = http.base_url.host, http.base_url.port
    head = f"POST /v1/datasets HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n"
    with socket.create_connection((host, port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"body_too_slow"' in answer


def test_a_body_that_trickles_is_given_up(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "SLOW_SECONDS", 0.5)

    pieces = iter(range(10 * PATIENCE_SECONDS))

    def body() -> Iterator[bytes]:
        for _ in pieces:
            yield b" "
            time.sleep(0.1)

    try:
        response = http.post("/v1/training-jobs", content=body(), headers=JSON)
    except httpx.TransportError:  # the server closed before we had sent all: as good an answer
        pass
    else:
        assert response.json()["code"] == "body_too_slow"
    assert next(pieces, None) is not None, "all of it was received"


def test_only_so_many_large_uploads_are_received_at_once(service: Service, serve: Serve) -> None:
    settings = service.settings.model_copy(update={"max_large_uploads": 1, "max_upload_bytes": 10_000_000})
    release = threading.Event()
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
    started = threading.Event()

    def held() -> Iterator[bytes]:
        yield head + bytes(2**21)
        started.set()
        release.wait(PATIENCE_SECONDS)
        yield b"\r\n--b--\r\n"

    def post_held() -> httpx.Response:
        while (answer := http.post("/v1/datasets", content=held(), headers=headers)).status_code == 503:
            pass  # one of the others had come before
        return answer

    with serve(settings) as http, ThreadPoolExecutor() as pool:
        first = pool.submit(post_held)
        try:
            started.wait(PATIENCE_SECONDS)

            def second() -> httpx.Response | None:
                time.sleep(0.5)  # so that the other, which is on its way, comes in before
                response = http.post("/v1/datasets", content=head + bytes(2**21), headers=headers)
                return response if response.status_code == 503 else None

            response = until(second)
            assert (response.status_code, response.json()["code"]) == (503, "too_many_uploads")
            assert int(response.headers["retry-after"]) > 0
            small = http.post("/v1/datasets", files={"file": ("a.png", PNG)})
            assert small.status_code == 201, small.text
        finally:
            release.set()
        assert first.result().status_code == 422
        again = http.post("/v1/datasets", content=head + bytes(2**21) + b"\r\n--b--\r\n", headers=headers)
        assert again.status_code == 422


def test_a_client_that_leaves_while_it_sends_leaves_nothing(
    http: httpx.Client, service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = http.base_url.host, http.base_url.port
    head = f"POST /v1/datasets HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100000\r\n"
    with socket.create_connection((host, port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n")
        time.sleep(0.2)
    time.sleep(0.5)
    assert http.get("/healthz").status_code == 200
    until(lambda: files_below(service.settings.data_directory) == [])
    assert not [record for record in caplog.records if record.exc_info]


def test_a_full_disk_is_said_and_nothing_is_half_written(service: Service, tmp_path: Path) -> None:
    """A limit on the size of files gives the API the error that a full disk gives, wherever it writes."""
    port, temporary, log = free_port(), tmp_path / "temporary", tmp_path / "api.log"
    temporary.mkdir()
    environment = {
        **os.environ,
        "FLOWPP_REDIS_URL": service.settings.redis_url,
        "FLOWPP_DATA_DIRECTORY": str(service.settings.data_directory),
        "FLOWPP_AUTHENTICATION": "false",
        "TMPDIR": str(temporary),
    }
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); "
        f"sys.argv = ['uvicorn', 'api.app:create_app', '--factory', '--port', '{port}']; "
        "runpy.run_module('uvicorn', run_name='__main__')"
    )
    api = child.start([sys.executable, "-c", limited], log, environment)
    content = np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), np.uint8)  # 1.8 MB
    np.save(tmp_path / "images.npy", content)
    try:
        with httpx.Client(base_url=f"http://{HOST}:{port}", trust_env=False, timeout=PATIENCE_SECONDS) as http:
            await_answer(str(http.base_url))
            with (tmp_path / "images.npy").open("rb") as file:
                response = http.post("/v1/datasets", files={"file": file})
            assert (response.status_code, response.json()["code"]) == (507, "disk_full")
            assert http.get("/v1/datasets").json()["data"] == []
            assert http.post("/v1/datasets", files={"file": ("a.png", PNG)}).status_code == 201
        assert files_below(temporary) == []
        assert "Traceback" not in log.read_text()
    finally:
        child.stop(api, PATIENCE_SECONDS)
