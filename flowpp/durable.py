"""Files and directories that are on disk wholly or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `directory` at the end of the block and is removed where the block raises.

    Raises `FileExistsError` where `directory` exists.
    """
    if directory.exists():
        raise FileExistsError(f"{directory} exists")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
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
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Writes `path`, new or in place of an older one: a reader finds the old content or all of the new."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with new_file(unfinished) as file:
            file.write(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
