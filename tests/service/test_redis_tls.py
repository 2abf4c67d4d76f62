"""Redis over TLS, as a user who may do no more than docs/operations.md says: a job of each kind passes through."""

import asyncio
import io
import re
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
import trustme

from api.stack import Stack
from flowpp.data import encode_png
from tests.waiting import PATIENCE_SECONDS, until
from worker.keys import NewKey
from worker.redis_server import HOST, RedisServer, free_port
from worker.service import Service
from worker.settings import Settings

PASSWORD = "a-password-of-this-test"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def acl() -> list[str]:
    """The rules that the documentation gives."""
    (line,) = re.findall(r"^ACL SETUSER flowpp (.*)$", OPERATIONS.read_text(), re.MULTILINE)
    return line.replace("PASSWORD", PASSWORD).split()


class Tls:
    """Terminates TLS before a server on this machine, whose binary has none. A context manager."""

    def __init__(self, behind: int, certificate: trustme.LeafCert) -> None:
        self.port = free_port()
        self._behind = behind
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(self._context)
        self._loop = asyncio.new_event_loop()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> "Tls":
        self._thread.start()
        assert self._listening.wait(PATIENCE_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        self._ended = asyncio.Event()
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            writers = [writer]
            try:
                far_reader, far_writer = await asyncio.open_connection(HOST, self._behind)
                writers.append(far_writer)
                await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
            except (OSError, asyncio.CancelledError):  # asyncio's streams would tell of the latter as a failure
                pass
            finally:
                for each in writers:
                    each.transport.abort()
                tasks.discard(task)

        server = await asyncio.start_server(connected, HOST, self.port, ssl=self._context)
        self._listening.set()
        await self._ended.wait()
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks)
        await asyncio.sleep(0.2)  # what was aborted is closed

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(2**16):
                writer.write(piece)
                await writer.drain()
        finally:
            writer.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    authority = trustme.CA()
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return authority, path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def admin(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(HOST, server.port, decode_responses=True) as admin:
        admin.execute_command("ACL", "SETUSER", "flowpp", *acl())
        yield admin


@pytest.fixture(scope="module")
def url(server: RedisServer, admin: redis.Redis, authority: tuple[trustme.CA, Path]) -> Iterator[str]:
    ca, path = authority
    with Tls(server.port, ca.issue_cert(HOST)) as tls:
        yield f"rediss://flowpp:{PASSWORD}@{HOST}:{tls.port}/0?ssl_ca_certs={path}"


def test_a_job_of_each_kind_passes_through(
    url: str, admin: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPP_REDIS_URL", url)
    monkeypatch.setenv("FLOWPP_AUTHENTICATION", "true")
    admin.execute_command("ACL", "LOG", "RESET")
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    with (
        Stack(tmp_path / "data", port=0) as stack,
        Service(Settings(redis_url=url, data_directory=stack.data)) as service,
        httpx.Client(base_url=stack.url, trust_env=False, timeout=PATIENCE_SECONDS) as http,
    ):
        http.headers["Authorization"] = f"Bearer {service.keys.create(NewKey(owner='alice'))[1]}"
        dataset = http.post("/v1/datasets", files={"file": ("images.npy", file.getvalue())}).json()["id"]
        request = {"dataset": dataset, "model": {"preset": "tiny"}, "training": {"steps": 4}}
        wait = {"Prefer": "wait=60"}
        training = http.post("/v1/training-jobs", json=request).json()["id"]
        stream = http.get(f"/v1/jobs/{training}/events", headers={"Accept": "text/event-stream"}).text
        assert '"status":"succeeded"' in stream
        picture = encode_png(np.zeros((8, 8, 3), np.uint8))
        scored = http.post(
            "/v1/likelihood-jobs", data={"model": training}, files={"files": ("a.png", picture)}, headers=wait
        )
        assert (scored.status_code, scored.json()["status"]) == (200, "succeeded")
        assert "ratelimit" in scored.headers
        sampled = http.post("/v1/sampling-jobs", json={"model": training, "num_samples": 1}, headers=wait)
        assert (sampled.status_code, sampled.json()["status"]) == (200, "succeeded")
        assert http.delete(f"/v1/jobs/{training}").status_code == 204
        until(lambda: len(service.celery.control.ping(timeout=3)) == 2, "a worker does not answer")
    denied = {(each["reason"], each["object"]) for each in admin.acl_log()}
    assert denied == set()


@pytest.mark.parametrize(
    "command", [("SET", "another", "1"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("PUBLISH", "a", "b")]
)
def test_the_user_may_do_nothing_else(url: str, command: tuple[str, ...]) -> None:
    with redis.Redis.from_url(url) as user, pytest.raises(redis.exceptions.NoPermissionError):
        user.execute_command(*command)


def test_a_server_that_the_authority_does_not_vouch_for_is_not_spoken_to(url: str, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "another.pem"))
    other = re.sub("ssl_ca_certs=.*", f"ssl_ca_certs={tmp_path / 'another.pem'}", url)
    with Service(Settings(redis_url=other, data_directory=tmp_path), redis_retries=0) as service:
        with pytest.raises(redis.ConnectionError, match="certificate verify failed"):
            service.redis.ping()
        with service.celery.connection_for_write() as connection, pytest.raises(Exception, match="certificate verify"):
            connection.ensure_connection(max_retries=0, timeout=5)
