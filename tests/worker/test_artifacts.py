"""The artifact store: what is in it is whole, and what is not whole is not in it."""

import time
from pathlib import Path

import numpy as np
import pytest

from worker import artifacts
from worker.artifacts import ArtifactStore, DamagedArtifact
from worker.refusals import NotFound


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source" / "png").mkdir(parents=True)
    (tmp_path / "source" / "a.txt").write_bytes(b"first")
    (tmp_path / "source" / "png" / "0000.png").write_bytes(b"second" * 1000)
    return tmp_path / "source"


@pytest.fixture(params=["directory", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """On a local directory, behind another fsspec file system, which keeps it in this process, and on an S3 server."""
    if request.param == "s3":
        return ArtifactStore(request.getfixturevalue("s3").new_store())
    return ArtifactStore(str(tmp_path / "store") if request.param == "directory" else f"memory://{tmp_path.name}")


def replace(store: ArtifactStore, path: str, content: bytes) -> None:
    store._fs.pipe_file(f"{store._root}/{path}", content)


def test_what_was_put_comes_back(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    manifest = store.put("jobs/job_1/attempt-1", source, {"id": "job_1"})
    assert store.manifest("jobs/job_1/attempt-1") == manifest
    assert manifest.record == {"id": "job_1"}
    assert {name: file.bytes for name, file in manifest.files.items()} == {"a.txt": 5, "png/0000.png": 6000}
    with store.open("jobs/job_1/attempt-1", "png/0000.png") as file:
        file.seek(6)
        assert file.read(6) == b"second"
    directory = store.fetch("jobs/job_1/attempt-1", tmp_path / "cache")
    assert (directory / "png" / "0000.png").read_bytes() == b"second" * 1000
    assert store.fetch("jobs/job_1/attempt-1", tmp_path / "cache") == directory
    store.verify("jobs/job_1/attempt-1")
    store.check()


def test_what_has_no_manifest_does_not_exist(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    store.put("datasets/ds_1", source)
    store._fs.rm_file(f"{store._root}/datasets/ds_1/manifest.json")
    for read in (
        lambda: store.manifest("datasets/ds_1"),
        lambda: store.open("datasets/ds_1", "a.txt"),
        lambda: store.fetch("datasets/ds_1", tmp_path / "cache"),
    ):
        with pytest.raises(NotFound):
            read()
    assert not (tmp_path / "cache" / "datasets" / "ds_1").exists()


def test_a_directory_that_could_not_be_stored_wholly_is_not_there(store: ArtifactStore, source: Path) -> None:
    (source / "not a name.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'not a name\.txt' is no name in the store"):
        store.put("jobs/job_1", source)
    assert store._fs.exists(f"{store._root}/jobs/job_1/a.txt")  # it was on its way
    with pytest.raises(NotFound):
        store.manifest("jobs/job_1")
    with pytest.raises(NotFound):
        store.open("jobs/job_1", "a.txt")


@pytest.mark.parametrize("content", [b"First", b"firs", b"first!"])
def test_a_changed_file_is_found_out(store: ArtifactStore, source: Path, content: bytes, tmp_path: Path) -> None:
    store.put("jobs/job_1", source)
    replace(store, "jobs/job_1/a.txt", content)
    with pytest.raises(DamagedArtifact, match=r"jobs/job_1/a\.txt"):
        store.verify("jobs/job_1")
    with pytest.raises(DamagedArtifact, match=r"jobs/job_1/a\.txt"):
        store.copy("jobs/job_1", tmp_path / "copy")
    with pytest.raises(DamagedArtifact, match=r"jobs/job_1/a\.txt"):
        store.fetch("jobs/job_1", tmp_path / "cache")
    with pytest.raises(DamagedArtifact, match=r"jobs/job_1/a\.txt"):
        store.read("jobs/job_1", "a.txt")
    assert not (tmp_path / "cache" / "jobs" / "job_1").exists()
    assert store.read("jobs/job_1", "png/0000.png") == b"second" * 1000


def test_of_a_damaged_file_the_end_does_not_come(store: ArtifactStore, source: Path) -> None:
    content = bytearray(np.random.default_rng(0).bytes(9_000_000))
    (source / "large").write_bytes(content)
    store.put("jobs/job_1", source)
    assert b"".join(store.pieces("jobs/job_1", "large")) == content
    content[0] ^= 1
    replace(store, "jobs/job_1/large", bytes(content))
    came = []
    with pytest.raises(DamagedArtifact, match="jobs/job_1/large"):
        came.extend(store.pieces("jobs/job_1", "large"))
    assert 0 < sum(map(len, came)) < len(content)


def test_a_fetched_file_is_read_again_only_after_it_was_changed(
    store: ArtifactStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("datasets/ds_1", source)
    hashed: list[object] = []
    copy = artifacts._copy
    directory = store.fetch("datasets/ds_1", tmp_path / "cache")
    monkeypatch.setattr(artifacts, "_copy", lambda *arguments: hashed.append(arguments) or copy(*arguments))
    store.fetch("datasets/ds_1", tmp_path / "cache")
    assert hashed == []
    (directory / "a.txt").write_bytes(b"First")
    if store.directory is not None:
        with pytest.raises(DamagedArtifact, match=r"datasets/ds_1/a\.txt"):
            store.fetch("datasets/ds_1", tmp_path / "cache")
    else:  # a copy of what is whole in the store is made again
        assert (store.fetch("datasets/ds_1", tmp_path / "cache") / "a.txt").read_bytes() == b"first"
    assert hashed != []


def test_a_record_is_verified(store: ArtifactStore) -> None:
    store.put_record("keys/key_1", {"owner": "alice", "scopes": ["read"]})
    manifest = store._fs.cat_file(f"{store._root}/keys/key_1/manifest.json")
    replace(store, "keys/key_1/manifest.json", manifest.replace(b"alice", b"alicf"))
    with pytest.raises(DamagedArtifact, match="record in keys/key_1"):
        store.manifest("keys/key_1")
    replace(store, "keys/key_1/manifest.json", manifest[:-20])
    with pytest.raises(DamagedArtifact, match="no manifest"):
        store.manifest("keys/key_1")


def test_a_listing_tells_of_all_files_and_their_time(store: ArtifactStore, source: Path) -> None:
    before = time.time()
    store.put("jobs/job_1/attempt-1", source)
    replace(store, "jobs/job_1/left", b"behind")
    found = store.listing("jobs")
    names = ["job_1/attempt-1/a.txt", "job_1/attempt-1/manifest.json", "job_1/attempt-1/png/0000.png", "job_1/left"]
    assert [(file.name, file.bytes) for file in found if "manifest" not in file.name] == [
        (names[0], 5),
        (names[2], 6000),
        (names[3], 6),
    ]
    assert [file.name for file in found] == names
    assert all(before - 2 < file.modified_at < time.time() + 2 for file in found)
    assert store.listing("keys") == []


@pytest.mark.parametrize(
    "name", ["../a.txt", "/etc/passwd", "png/../a.txt", "", ".", "png", "b.txt", "manifest.json", "a.txt\0", "x" * 300]
)
def test_only_names_in_the_manifest_open(store: ArtifactStore, source: Path, name: str) -> None:
    store.put("jobs/job_1", source)
    with pytest.raises(NotFound):
        store.open("jobs/job_1", name)


def test_deletion_leaves_nothing_and_may_be_repeated(store: ArtifactStore, source: Path) -> None:
    store.put("jobs/job_1/attempt-1", source)
    store.put("jobs/job_2", source)
    store.delete("jobs/job_1")
    store.delete("jobs/job_1")
    with pytest.raises(NotFound):
        store.manifest("jobs/job_1/attempt-1")
    assert not [path for path in store._fs.find(store._root) if "job_1" in path]
    store.verify("jobs/job_2")


def test_a_prefix_cannot_leave_the_store(store: ArtifactStore, source: Path) -> None:
    for prefix in ("..", "../x", "/x", "jobs/../../x", ""):
        with pytest.raises(ValueError, match="is no name in the store"):
            store.put(prefix, source)
        with pytest.raises(ValueError, match="is no name in the store"):
            store.delete(prefix)
