"""Files that are on disk wholly or not at all, many at once."""

import sys
from pathlib import Path
from typing import Any

import pytest

from flowpp import durable
from flowpp.durable import NewFiles


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [1, 10, 11, 300])
def test_files_written_together_are_there_whole_when_all_are_finished(tmp_path: Path, count: int) -> None:
    files = NewFiles()
    (tmp_path / "0").write_text("older")
    for number in range(count):
        files.write(tmp_path / str(number), f"file {number}".encode())
    assert {name: text for name, text in content(tmp_path).items() if not name.startswith(".")} == {"0": "older"}
    assert files.finish() == {}
    assert content(tmp_path) == {str(number): f"file {number}" for number in range(count)}
    assert files.finish() == {}


@pytest.mark.parametrize("count", [2, 40])
def test_what_cannot_be_put_in_its_place_is_told_and_the_others_are_there(tmp_path: Path, count: int) -> None:
    files, gone, folder = NewFiles(), tmp_path / "gone", tmp_path / "folder"
    gone.mkdir()
    folder.mkdir()
    (folder / "file").touch()
    for number in range(count):
        files.write(tmp_path / str(number), b"")
    files.write(gone / "file", b"")
    files.write(folder, b"")
    next(gone.iterdir()).unlink()
    gone.rmdir()
    failed = files.finish()
    assert set(failed) == {gone / "file", folder}
    assert isinstance(failed[gone / "file"], FileNotFoundError)
    assert set(content(tmp_path)) == {"file", *map(str, range(count))}


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    files = NewFiles()
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "missing" / "file", b"")
    with pytest.raises(TypeError):
        files.write(tmp_path / "file", "text")  # type: ignore[arg-type]
    assert files.finish() == {}
    assert content(tmp_path) == {}


def test_files_that_cannot_be_synced_are_not_put_in_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    files = NewFiles()
    (tmp_path / "a").write_text("older")
    for name in "ab":
        files.write(tmp_path / name, b"newer")
    monkeypatch.setattr(durable, "_sync", full)
    failed = files.finish()
    assert {path.name: error.errno for path, error in failed.items()} == {"a": 28, "b": 28}
    assert content(tmp_path) == {"a": "older"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="syncfs is of Linux")
@pytest.mark.parametrize(("count", "syncs"), [(3, 3 + 1), (100, 1 + 1)])
def test_many_files_are_synced_by_their_file_system_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, syncs: int
) -> None:
    synced, sync = [], durable._sync

    def counted(path: Path, *how: Any) -> None:
        synced.append(path)
        sync(path, *how)

    monkeypatch.setattr(durable, "_sync", counted)
    files = NewFiles()
    for number in range(count):
        files.write(tmp_path / str(number), b"")
    assert files.finish() == {}
    assert len(synced) == syncs
