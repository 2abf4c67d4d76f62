"""The artifact store: what is in it is whole, and what is not whole is not in it."""

from pathlib import Path

import pytest

from worker.artifacts import ArtifactStore, DamagedArtifact
from worker.refusals import NotFound


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source" / "png").mkdir(parents=True)
    (tmp_path / "source" / "a.txt").write_bytes(b"first")
    (tmp_path / "source" / "png" / "0000.png").write_bytes(b"second" * 1000)
    return tmp_path / "source"


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """On a local directory, and behind another fsspec file system, which keeps it in this process."""
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
    if store.directory is None or len(content) != 5:  # a local file is read in place, and checked by its size
        with pytest.raises(DamagedArtifact, match=r"jobs/job_1/a\.txt"):
            store.fetch("jobs/job_1", tmp_path / "cache")
        assert not (tmp_path / "cache" / "jobs" / "job_1").exists()


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
