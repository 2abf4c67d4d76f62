"""Files and directories that are on disk wholly or not at all."""

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_FEW = 10
"""So many files are synced one by one: what else waits to be written to their disk need not wait to be as well."""

_SYNC_FILE_SYSTEM = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
"""Linux has it."""


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `directory` at the end of the block and is removed where the block raises.

    Raises `FileExistsError` where `directory` exists.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(directory)
    unfinished.mkdir()
    try:
        yield unfinished
        _sync(unfinished)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    _sync(directory.parent)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """The new file `path` to write, on disk at the end of the block. Raises `FileExistsError`."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Returns when a file that somebody else wrote is on disk."""
    _sync(path)


def replace_file(path: Path, data: bytes) -> None:
    """Writes `path`, new or in place of an older one: a reader finds the old content or all of the new."""
    unfinished = _unfinished(path)
    try:
        with new_file(unfinished) as file:
            file.write(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(path.parent)


class NewFiles:
    """Files that are written one by one, new or in place of older ones, and are all on disk when `finish` returns.

    To sync them together takes a fraction of the time. Until then there is none of them. Several threads may write.
    """

    def __init__(self) -> None:
        self._unfinished: list[tuple[Path, Path]] = []

    def write(self, path: Path, data: bytes) -> None:
        """Raises `OSError`; nothing of the file is left then."""
        unfinished = _unfinished(path)
        try:
            with unfinished.open("xb") as file:
                file.write(data)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._unfinished.append((unfinished, path))

    def finish(self) -> dict[Path, OSError]:
        """Puts all in their places; those that could not be, of which nothing is left, with the reasons.

        Raises `OSError` where they may be lost with the power.
        """
        written, self._unfinished = self._unfinished, []
        failed: dict[Path, OSError] = {}
        try:
            _sync_all([unfinished for unfinished, _ in written])
        except OSError as error:
            failed = {path: error for _, path in written}
        for unfinished, path in written:
            try:
                if path not in failed:
                    unfinished.replace(path)
            except OSError as error:
                failed[path] = error
            if path in failed:
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)
        _sync_all({path.parent for _, path in written if path not in failed})
        return failed


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _sync_all(paths: Collection[Path]) -> None:
    """Returns when files and directories are on disk that may be gone; many, with all else that waits to be written."""
    synced: set[int] = set()
    for path in paths:
        with suppress(FileNotFoundError):
            if _SYNC_FILE_SYSTEM is None or len(paths) <= _FEW:
                _sync(path)
            elif (device := path.stat().st_dev) not in synced:
                _sync(path, _SYNC_FILE_SYSTEM)
                synced.add(device)


def _sync(path: Path, sync: Callable[[int], int | None] = os.fsync) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sync(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)
