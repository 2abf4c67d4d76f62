"""Files on their way to the service and from it."""

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import httpx

from api.client.errors import DamagedDownload, ProblemError, Unreachable
from api.client.transport import Retries, Transport

Report = Callable[[int, int], None]
"""Called with bytes sent or received so far, and bytes in all."""

_TAG = re.compile(r'"([\w-]{1,100})"')
_ENTRY = re.compile(r"[A-Za-z0-9_-]+/([A-Za-z0-9_][A-Za-z0-9_.-]*)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ESCAPED = re.compile("[\ud800-\udfff]|%(?=[0-9A-Fa-f]{2})")
"""A byte of a name that is not UTF-8, and a `%` that looks like the beginning of its escape."""


@contextmanager
def as_file(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """A name and an open file; of a folder, its files in a temporary zip with their relative paths."""
    if not source.is_dir():
        with source.open("rb") as file:
            yield sendable(source.name), file
        return
    with tempfile.TemporaryFile() as file:
        # A zip has no times before 1980; such a file gets the first time that there is.
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
            for path in sorted(source.rglob("*")):
                if path.is_file():
                    archive.write(path, sendable(path.relative_to(source).as_posix()))
        file.seek(0)
        yield f"{sendable(source.resolve().name)}.zip", file


def sendable(name: str) -> str:
    """A file's name as Unicode; different names stay different.

    Each byte that is not UTF-8, which Python shows as a lone surrogate, becomes `%XX`. A `%` that hexadecimal digits
    follow becomes `%25`.
    """
    return _ESCAPED.sub(lambda found: f"%{ord(found[0]) & 0xFF:02X}", name)


class Counted:
    """A file that reports how much of it has been read."""

    def __init__(self, file: IO[bytes], report: Report) -> None:
        self._file = file
        self._report = report
        self._total = os.fstat(file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._report(self._file.tell(), self._total)
        return chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def counted(file: IO[bytes], report: Report | None) -> Any:
    return file if report is None else Counted(file, report)


async def download(transport: Transport, path: str, target: Path, report: Report | None) -> Path:
    """Writes the body to `target`, whole or not at all.

    What has arrived before a break lies beside `target`, under the name `TARGET.ETAG.partial`; this call, or one after
    it, asks only for the rest. Where the ETag is a sha256, the file is checked against it. Raises `DamagedDownload`.
    """
    await transport.way.run(partial(target.parent.mkdir, parents=True, exist_ok=True))
    retries, arrived = Retries(transport.max_retries), -1
    while True:
        try:
            part = await _receive(transport, path, target, report)
        except Unreachable:
            size = sum(part.stat().st_size for part, _ in _parts(target))
            if size > arrived:  # it gets on
                retries, arrived = Retries(transport.max_retries), size
            pause = retries.pause()
            if pause is None:
                raise
            await transport.way.sleep(pause)
        except ProblemError as error:
            if error.status != 416 or not _discard(target):  # beyond the end: what lies here is not its beginning
                raise
        else:
            await transport.way.run(partial(_check, part))
            part.replace(target)
            _discard(target)
            return target


async def _receive(transport: Transport, path: str, target: Path, report: Report | None) -> Path:
    headers = {"Accept-Encoding": "identity"}  # ranges and lengths are the file's then
    left = _parts(target)
    if left:
        part, tag = left[0]
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": f'"{tag}"'}
    async with transport.stream("GET", path, headers=headers) as response:
        continues = bool(left) and response.status_code == 206
        if continues:
            _check_begins(response, part.stat().st_size)
        else:
            _discard(target)
            found = _TAG.fullmatch(response.headers.get("etag", ""))
            part = target.with_name(f"{target.name}.{found[1] if found else ''}.partial")
        with part.open("ab" if continues else "wb") as file:
            total = file.tell() + int(response.headers.get("content-length", 0))
            async for chunk in response.aiter_raw():
                file.write(chunk)
                if report is not None:
                    report(file.tell(), total)
    return part


def _check_begins(response: httpx.Response, size: int) -> None:
    said = response.headers.get("content-range", "")
    if not said.startswith(f"bytes {size}-"):
        raise DamagedDownload(f"asked for the bytes from {size} on, the service sent {said or 'others'}")


def _parts(target: Path) -> list[tuple[Path, str]]:
    """What lies here of earlier tries, each with the ETag that it is of."""
    found = []
    for path in target.parent.iterdir():
        if path.name.startswith(f"{target.name}.") and path.name.endswith(".partial"):
            tag = path.name[len(target.name) + 1 : -len(".partial")]
            if _TAG.fullmatch(f'"{tag}"') and path.stat().st_size:
                found.append((path, tag))
    return found


def _discard(target: Path) -> bool:
    parts = _parts(target)
    for part, _ in parts:
        part.unlink()
    return bool(parts)


def _check(part: Path) -> None:
    tag = part.name.split(".")[-2]
    if not _SHA256.fullmatch(tag):
        return
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != tag:
        part.unlink()
        raise DamagedDownload(f"what arrived has the sha256 {found}, what the service has {tag}; try again")


def unpack(archive: Path, directory: Path) -> None:
    """The files of a downloaded checkpoint into the new `directory`, whole or not at all. Raises `DamagedDownload`."""
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        unfinished = Path(temporary) / "checkpoint"
        unfinished.mkdir()
        try:
            with zipfile.ZipFile(archive) as found:
                for entry in found.infolist():
                    with found.open(entry) as source, (unfinished / _plain_name(entry)).open("xb") as file:
                        shutil.copyfileobj(source, file, 2**20)
        except (zipfile.BadZipFile, FileExistsError) as error:
            raise DamagedDownload(f"{archive} is no checkpoint's archive: {error}") from error
        unfinished.rename(directory)


def _plain_name(entry: zipfile.ZipInfo) -> str:
    found = _ENTRY.fullmatch(entry.filename)
    if found is None or entry.compress_type != zipfile.ZIP_STORED:
        raise DamagedDownload(f"{entry.filename!r} does not belong into a checkpoint's archive")
    return found[1]
