"""What an S3 server adds to the artifact store: parts, other processes, and that it may fail."""

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3fs import S3FileSystem

from tests.s3 import S3
from worker.artifacts import ArtifactStore, DamagedArtifact
from worker.object_store import BLOCK_BYTES, StoreUnavailable
from worker.refusals import NotFound


@pytest.fixture
def url(s3: S3) -> str:
    return s3.new_store()


@pytest.fixture
def store(url: str) -> ArtifactStore:
    return ArtifactStore(url)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A directory with a file of three parts."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "large").write_bytes(np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 5))
    return tmp_path / "source"


def test_a_large_file_is_stored_in_parts(s3: S3, url: str, store: ArtifactStore, large: Path) -> None:
    store.put("datasets/ds_1", large)
    assert s3.objects(url)["datasets/ds_1/large"] == 2 * BLOCK_BYTES + 5
    head = s3.client.head_object(Bucket=url.split("/")[2], Key="folder/datasets/ds_1/large", PartNumber=1)
    assert head["PartsCount"] == 3
    store.verify("datasets/ds_1")
    assert s3.uploads(url) == []


def test_of_a_large_file_no_more_is_fetched_than_the_parts_asked_for(
    store: ArtifactStore, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("datasets/ds_1", large)
    stored = (large / "large").read_bytes()
    before_end = [len(stored), len(stored) // 2, 100]
    fetched: list[int] = []
    call = S3FileSystem._call_s3

    async def counted(fs: S3FileSystem, method: str, *args: Any, **kwargs: Any) -> Any:
        answer = await call(fs, method, *args, **kwargs)
        if method == "get_object" and kwargs["Key"].endswith("large"):
            fetched.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    assert store.parts("datasets/ds_1", "large", before_end, 100) == [
        stored[len(stored) - each :][:100] for each in before_end
    ]
    assert fetched == [100, 100, 100]
    with pytest.raises(DamagedArtifact, match="too short"):
        store.parts("datasets/ds_1", "large", [len(stored) + 1], 100)


@pytest.mark.parametrize("pieces", [1, 6])
def test_an_upload_that_was_ended_leaves_nothing(
    s3: S3, url: str, store: ArtifactStore, large: Path, pieces: int
) -> None:
    """Before the first part was sent, and after."""

    def fail_to_write() -> None:
        with store._writing(store._path("datasets/ds_1", "large")) as file:
            for _ in range(pieces):
                file.write(bytes(2**22))
            assert bool(s3.uploads(url)) == (pieces == 6)
            raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"):
        fail_to_write()
    gc.collect()  # a file that was not closed would be written now
    assert s3.uploads(url) == []
    assert s3.objects(url) == {}


def test_what_another_process_writes_is_seen_at_once(url: str, store: ArtifactStore, tmp_path: Path) -> None:
    def elsewhere(statement: str) -> None:
        code = f"from worker.artifacts import ArtifactStore\nstore = ArtifactStore({url!r})\n{statement}"
        subprocess.run([sys.executable, "-c", code], check=True)

    assert store.listing("keys") == []
    with pytest.raises(NotFound):
        store.manifest("keys/key_1")
    elsewhere("store.put_record('keys/key_1', {'owner': 'alice'})")
    assert [file.name for file in store.listing("keys")] == ["key_1/manifest.json"]
    assert store.manifest("keys/key_1").record == {"owner": "alice"}
    elsewhere("store.put_record('keys/key_1', {'owner': 'bob'})")
    assert store.manifest("keys/key_1").record == {"owner": "bob"}
    elsewhere("store.delete('keys/key_1')")
    assert store.listing("keys") == []


def test_threads_share_a_store(store: ArtifactStore) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for each in range(10):
                prefix = f"keys/key_{number}_{each}"
                store.put_record(prefix, {"number": number})
                assert store.manifest(prefix).record == {"number": number}
                store.delete(prefix)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.listing("keys") == []


def test_a_server_that_is_away_is_an_os_error(url: str, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    away = ArtifactStore(url)
    for ask in (
        away.check,
        lambda: away.manifest("keys/key_1"),
        lambda: away.listing("keys"),
        lambda: away.delete("keys/key_1"),
        lambda: away.put_record("keys/key_1", {}),
        lambda: away.read("keys/key_1", "a"),
    ):
        with pytest.raises(StoreUnavailable, match="Could not connect"):
            ask()


def test_no_bucket_is_an_os_error_to_who_writes(store: ArtifactStore, s3: S3) -> None:
    with pytest.raises(FileNotFoundError):
        ArtifactStore("s3://there-is-no-such-bucket/folder").check()


def test_no_credentials_are_an_os_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreUnavailable, match="credentials"):
        ArtifactStore(url).check()


class Failing(BaseHTTPRequestHandler):
    """Answers 503 so often, and then as an S3 server would to PUT and DELETE."""

    protocol_version = "HTTP/1.1"
    failures = 0
    answer = 503
    asked: list[str]

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.asked.append(self.command)
        failing = len(self.asked) <= self.failures
        body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>" if self.answer == 403 else b""
        self.send_response(self.answer if failing else 200)
        self.send_header("Content-Length", str(len(body) if failing else 0))
        self.end_headers()
        if failing:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Failing]]:
    handler = type("Handler", (Failing,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield handler
        server.shutdown()
        thread.join()


def test_a_failure_that_passes_is_not_seen(url: str, failing: type[Failing]) -> None:
    failing.failures = 2
    ArtifactStore(url).put_record("keys/key_1", {})
    assert failing.asked == ["PUT"] * 3


def test_a_failure_that_stays_is_an_os_error(url: str, failing: type[Failing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    failing.failures = 1_000
    with pytest.raises(OSError, match="Service Unavailable"):
        ArtifactStore(url).put_record("keys/key_1", {})
    failing.answer = 403
    with pytest.raises(PermissionError):
        ArtifactStore(url).put_record("keys/key_1", {})
