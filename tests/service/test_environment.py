"""Each process names a broken environment variable in one sentence."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import certifi
import numpy as np
import pytest

from flowpp.environment import BrokenVariable
from worker import child
from worker.redis_server import RedisServer
from worker.settings import from_environment

BIN = Path(sys.executable).parent

BROKEN = {
    "FLOWPP_LEASE_SECONDS": "abc",
    "FLOWPP_MAX_PROCESSES": "0",
    "FLOWPP_AUTHENTICATION": "perhaps",
    "FLOWPP_LOG_FORMAT": "xml",
    "FLOWPP_WEBHOOK_NETWORKS": "10.0.0.0/8,nowhere",
    "FLOWPP_METRICS_PORT": "99999",
    "FLOWPP_REDIS_URL": "http://:hidden@127.0.0.1",
    "FLOWPP_STORE": "s4://bucket",
    "SSL_CERT_FILE": "/proc/nowhere/cacert.pem",
    "SSL_CERT_DIR": "/proc/nowhere",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "127.0.0.1:4318",
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_is_named_with_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)  # httpx prefers it to a directory
    monkeypatch.setenv(name, BROKEN[name])
    with pytest.raises(BrokenVariable) as raised:
        from_environment()
    sentence = str(raised.value)
    assert sentence.startswith(name)
    assert "\n" not in sentence
    if name == "FLOWPP_REDIS_URL":
        assert "hidden" not in sentence
    elif name != "OTEL_EXPORTER_OTLP_ENDPOINT":  # which may hold a key
        assert BROKEN[name].rpartition(",")[2] in sentence


def test_a_password_in_a_damaged_url_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWPP_REDIS_URL", "redis://:pass/word@127.0.0.1:6379/0")
    with pytest.raises(BrokenVariable) as raised:
        from_environment()
    assert "pass" not in str(raised.value)


def test_a_file_that_holds_no_certificates_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with pytest.raises(BrokenVariable, match=r"SSL_CERT_FILE is .*/ca.pem, which holds no certificates"):
        from_environment()


def test_variables_that_nothing_reads_here_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    monkeypatch.setenv("SSL_CERT_DIR", "/proc/nowhere")  # httpx prefers the file
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/proc/nowhere")  # of the sender of traces
    monkeypatch.setenv("AWS_CA_BUNDLE", "/proc/nowhere")  # of a store in S3
    assert from_environment()


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "OTEL_EXPORTER_OTLP_CERTIFICATE", "AWS_CA_BUNDLE"])
def test_certificates_of_what_is_configured_are_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://127.0.0.1:4318")
    monkeypatch.setenv("FLOWPP_STORE", "s3://bucket/folder")
    monkeypatch.setenv(name, "/proc/nowhere")
    with pytest.raises(BrokenVariable, match=f"^{name} is /proc/nowhere, which cannot be read: No such file"):
        from_environment()


PROCESSES: dict[str, list[str | Path]] = {
    "worker": [sys.executable, "-m", "worker", "inference"],
    "api": [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", "0"],
    "serve": [BIN / "flowpp", "serve", "--port", "0"],
    "keys": [BIN / "flowpp", "keys", "list"],
}


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "FLOWPP_LEASE_SECONDS", "FLOWPP_REDIS_URL"])
@pytest.mark.parametrize("process", PROCESSES)
def test_each_process_ends_with_the_sentence(process: str, name: str, tmp_path: Path) -> None:
    ended = _run(PROCESSES[process], tmp_path, {name: BROKEN[name]})
    assert ended.returncode in (1, 2)
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert f": {name} " in ended.stderr


@pytest.mark.parametrize("process", ["worker", "keys"])
@pytest.mark.parametrize("store", ["{path}/file/store", "ftp://127.0.0.1:1/x", "zip://x"])
def test_a_store_that_cannot_be_made_is_named(store: str, process: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = _run(PROCESSES[process], tmp_path, {"FLOWPP_STORE": store.format(path=tmp_path)})
    assert ended.returncode in (1, 2)
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "FLOWPP_STORE" in ended.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("FLOWPP_URL", "127.0.0.1:8000"), ("FLOWPP_URL", "http://:::x"), ("FLOWPP_API_KEY", "flowpp_a\nb")],
)
def test_a_client_names_its_variable(name: str, value: str, tmp_path: Path) -> None:
    ended = _run([BIN / "flowpp", "jobs", "list"], tmp_path, {name: value})
    assert ended.returncode == 2
    assert name in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "8"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "here")],
)
def test_a_training_names_the_variable(name: str, value: str, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    train = ["train", tmp_path / "run", "--data", tmp_path / "images.npy", "--preset", "tiny", "--steps", "1"]
    ended = _run([sys.executable, "-m", "flowpp", *train], tmp_path, {name: value})
    assert ended.returncode == 2
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("flowpp: ")
    assert name in last
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SSL_CERT_FILE", "/proc/nowhere"),  # the client uses its own certificates
        ("HTTP_PROXY", "socks5://nowhere"),
        ("ALL_PROXY", "::::"),
        ("COLUMNS", "abc"),
        ("TZ", "No/Where"),
        ("TMPDIR", "/proc/nowhere"),
        ("HOME", "/proc/nowhere"),
    ],
)
def test_a_client_does_without_what_it_does_not_need(name: str, value: str, tmp_path: Path) -> None:
    ended = _run([BIN / "flowpp", "jobs", "list", "--url", "http://127.0.0.1:1"], tmp_path, {name: value})
    assert ended.returncode == 3, ended.stderr
    assert "cannot be reached" in ended.stderr


def _run(command: list[str | Path], directory: Path, changed: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Runs a process to its end; no Redis server answers it."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"FLOWPP_REDIS_URL": "redis://127.0.0.1:1/0", "FLOWPP_DATA_DIRECTORY": str(directory)}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | changed
    return subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("queue", ["training", "inference"])
def test_a_worker_shows_its_own_lines_alone(queue: str, tmp_path: Path) -> None:
    """No banner, farewell or warning of Celery; what Celery warns of is there."""
    with RedisServer(tmp_path / "redis") as server:
        environment = os.environ | {"FLOWPP_REDIS_URL": server.url, "FLOWPP_DATA_DIRECTORY": str(tmp_path)}
        command = [sys.executable, "-m", "worker", queue]
        process = child.start(command, log := tmp_path / "worker.log", environment | {"OMP_NUM_THREADS": "1"})
        try:
            _until(lambda: "waits for jobs" in log.read_text(), log)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            child.stop(process)
        lines = log.read_text().splitlines()
        assert len(lines) == 2, lines
        assert all(f" INFO worker: {queue}@" in line for line in lines)

        process = child.start(command, log, environment | {"OMP_NUM_THREADS": "1"})
        try:
            _until(lambda: log.read_text().count("waits for jobs") == 2, log)
            server.stop()
            _until(
                lambda: "celery.worker.consumer.consumer: consumer: Cannot connect to redis://" in log.read_text(), log
            )
        finally:
            child.stop(process, 30)


def _until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
