"""The local stack in real processes: it leaves nothing behind, however it ends, and keeps its data."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import redis

from api.client import Client
from api.stack import Stack, StackError
from tests.waiting import PATIENCE_SECONDS, until
from worker.redis_server import RedisServer, RedisServerError, free_port


@pytest.fixture
def serve(tmp_path: Path) -> Iterator["Serve"]:
    process = Serve(tmp_path)
    yield process
    process.kill()


class Serve:
    """`flowpp serve` in a process of its own, with the processes that it started."""

    def __init__(self, directory: Path) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = ["from api.cli import main; main()", "serve", "--port", str(port), "--data", str(directory / "data")]
        self.log = directory / "serve.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", *command], stdout=log, stderr=subprocess.STDOUT)
        self._wait_until_ready()
        self.look()

    def look(self) -> None:
        """Takes note of every process that ours has started, and those in turn."""
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def _wait_until_ready(self) -> None:
        until(lambda: "flowpp serves on" in self.log.read_text() or self.process.poll() is not None, self.log.read_text)
        assert self.process.poll() is None, self.log.read_text()

    def survivors(self) -> list[psutil.Process]:
        """The family's members that are still there after a time in which all should have gone."""
        return psutil.wait_procs(self.family, timeout=PATIENCE_SECONDS)[1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for member in self.family:
            if member.is_running():
                member.kill()


def small_images(directory: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.save(directory / "images.npy", images)
    return directory / "images.npy"


def test_a_served_stack_is_four_children_and_answers(serve: Serve) -> None:
    assert httpx.get(f"{serve.url}/readyz", trust_env=False).is_success
    commands = [" ".join(member.cmdline()) for member in serve.family]
    for expected in ("valkey-server", "uvicorn api.app:create_app", "worker training", "worker inference"):
        assert any(expected in command for command in commands), commands


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_process_survives_the_stack_while_it_trains(serve: Serve, tmp_path: Path, signum: int, status: int) -> None:
    with Client(serve.url) as client:
        dataset = client.datasets.upload(small_images(tmp_path))
        job = client.training_jobs.create(dataset=dataset.id, model={"preset": "tiny"}, training={"steps": 1_000_000})
        assert any(event.type == "metrics" for event in client.jobs.events(job.id))
    serve.look()
    assert any("flowpp" in member.cmdline() and "train" in member.cmdline() for member in serve.family)
    serve.process.send_signal(signum)
    assert serve.process.wait(PATIENCE_SECONDS) == status, serve.log.read_text()
    assert serve.survivors() == []


def test_a_child_that_dies_ends_the_stack_and_the_message_shows_its_log(serve: Serve) -> None:
    [worker] = [member for member in serve.family if member.cmdline()[-2:] == ["worker", "training"]]
    worker.kill()
    assert serve.process.wait(PATIENCE_SECONDS) == 1
    assert "the training process was killed by signal 9; the end of" in serve.log.read_text()
    assert serve.survivors() == []


def test_data_survives_a_restart_and_a_second_stack_is_kept_out(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Stack(data, port=0) as stack, Client(stack.url) as client:
        uploaded = client.datasets.upload(small_images(tmp_path))
        with pytest.raises(StackError, match=rf"another stack \(process {os.getpid()}\) uses"):
            Stack(data, port=0).start()
    with Stack(data, port=0) as stack, Client(stack.url) as client:
        assert client.datasets.get(uploaded.id) == uploaded


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} of 127.0.0.1 cannot be used: Address already in use"):
            Stack(tmp_path, port).start()
    assert not any(tmp_path.iterdir())


def test_a_redis_server_keeps_every_answered_write_through_sigkill(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        assert server.process is not None
        with redis.Redis.from_url(server.url) as client:
            client.set("answered", "yes")
            assert client.config_get("appendfsync")["appendfsync"] == "always"
        server.process.kill()
    with RedisServer(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("answered") == b"yes"


def test_a_redis_server_on_a_taken_port_says_so(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path / "first") as first,
        pytest.raises(RedisServerError, match="Address already in use"),
        RedisServer(tmp_path / "second", port=first.port),
    ):
        pass
