"""The files inside folders and archives, as streams: nothing is ever unpacked to a path.

Bytes are counted as they come out, whatever the headers claim.
"""

import gzip
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from flowpp import tar
from flowpp.images import ACCEPTED, BadImages, Limits, too_many_bytes

_MAX_RATIO = 200  # bytes out for a byte in; pixels of photographs compress by less than 10
_FREE_BYTES = 2**24  # bytes out before the ratio counts
_JUNK = {"__macosx", "thumbs.db", "desktop.ini"}
_ARCHIVES = (b"PK\3\4", b"PK\5\6", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!")
_DAMAGE = (
    EOFError,
    NotImplementedError,
    OverflowError,
    UnicodeDecodeError,
    gzip.BadGzipFile,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Member:
    """A file of a source: its path in there, with `/`, and its content, to be read before the next member."""

    name: str
    stream: io.BufferedReader

    @property
    def file(self) -> str:
        """The last part of the name."""
        return PurePosixPath(self.name).name

    def read(self, most: int) -> bytes:
        """The whole content. Raises `BadImages` where it has more than `most` bytes."""
        data = self.stream.read(most + 1)
        if len(data) > most:
            raise too_many_bytes(self.name, most)
        return data


class _Meter:
    """Counts the bytes that come out of a source of `archive_bytes`, or of plain files where that is None."""

    def __init__(self, limits: Limits, archive_bytes: int | None = None) -> None:
        self.total = 0
        self._archive_bytes = archive_bytes
        self._most = limits.max_bytes if archive_bytes is None else limits.max_uncompressed_bytes

    def count(self, size: int) -> None:
        self.total += size
        if self.total > self._most:
            raise BadImages("too_large", f"the images' files have more than the {self._most:,} bytes that are accepted")
        if self._archive_bytes and self.total > max(_FREE_BYTES, _MAX_RATIO * self._archive_bytes):
            message = f"the archive grows more than {_MAX_RATIO}-fold on unpacking, as a decompression bomb does"
            raise BadImages("decompression_bomb", message)


class _Metered(io.RawIOBase):
    """A stream whose bytes are counted and whose damage is reported as `BadImages`."""

    def __init__(self, inner: IO[bytes] | gzip.GzipFile, meter: _Meter, name: str) -> None:
        self._inner, self._meter, self._name = inner, meter, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # any writable buffer
        try:
            data = self._inner.read(len(buffer))
        except _DAMAGE as error:
            raise BadImages("damaged_archive", f"cannot be unpacked: {error!s:.200}", self._name) from error
        self._meter.count(len(data))
        buffer[: len(data)] = data
        return len(data)


def members(source: Path | Sequence[Path], limits: Limits) -> Iterator[Member]:
    """The files of a folder, of a .zip, .tar or .tar.gz (told by content), of several files, or the one file itself.

    Folders and zip files come sorted by name, a tar in its own order. Hidden files and what macOS and Windows leave
    behind are passed over. Raises `BadImages`.
    """
    if not isinstance(source, Path):
        yield from _files([(path, path.name) for path in source], limits)
    elif source.is_dir():
        yield from _files(walk(source, limits), limits)
    elif not source.exists():
        raise BadImages("no_such_file", "there is no such file or folder", str(source))
    else:
        yield from _archive_or_file(source, limits)


def _archive_or_file(source: Path, limits: Limits) -> Iterator[Member]:
    if source.stat().st_size > limits.max_bytes:
        raise BadImages("too_large", f"has more than the {limits.max_bytes:,} bytes that are accepted", source.name)
    with source.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        if head.startswith((b"PK\3\4", b"PK\5\6")):
            yield from _zip(source, limits)
        elif head.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield from _tar(unzipped, source, limits)
        elif _is_tar(head):
            yield from _tar(file, source, limits)
        else:
            yield from _files([(source, source.name)], limits)


def walk(folder: Path, limits: Limits) -> list[tuple[Path, str]]:
    """The files under `folder` that are not passed over, with their paths in it, sorted by those."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not _is_junk(name)]
        for name in folders:
            if Path(parent, name).is_symlink():
                raise BadImages("unsafe_folder", "is a link to a folder, which is not followed", name)
        paths = [Path(parent, name) for name in files if not _is_junk(name)]
        found += [(path, path.relative_to(folder).as_posix()) for path in paths]
        if len(found) > limits.max_images:
            raise _too_many("files", limits.max_images)
    return sorted(found, key=lambda item: item[1])


def _raise(error: OSError) -> NoReturn:
    raise error


def _files(files: Sequence[tuple[Path, str]], limits: Limits) -> Iterator[Member]:
    meter = _Meter(limits)
    for path, name in files:
        if not path.exists():
            raise BadImages("no_such_file", "there is no such file", str(path))
        if not path.is_file():
            raise BadImages("not_an_image", f"is no plain file; {ACCEPTED}", name)
        with path.open("rb") as file:
            yield Member(name, io.BufferedReader(_Metered(file, meter, name)))


def _zip(source: Path, limits: Limits) -> Iterator[Member]:
    size = source.stat().st_size
    meter = _Meter(limits, size)
    with _ZipFile(source, limits) as file, _open_zip(file, source.name) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
        names = [_checked_entry(entry, size) for entry in entries]
        for entry, name in zip(entries, names, strict=True):
            if not entry.is_dir() and not _is_junk(name):
                with _open_entry(archive, entry, name) as content:
                    yield _inner_member(name, _Metered(content, meter, name))


class _ZipFile(io.FileIO):
    """A file that refuses to hand out a zip directory of too many entries, also where it claims to have fewer.

    zipfile reads the directory in one piece and then makes an object of each entry. Each begins with this signature.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        super().__init__(path)
        self._most = min(limits.max_entries, limits.max_zip_entries)
        claimed = _claimed_entries(self)
        if claimed > self._most:
            self.close()
            raise self._too_many(f"{claimed:,} entries, more")

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > max(2**20, 256 * self._most):
            raise self._too_many("more entries")
        data = super().read(size)
        if data.count(b"PK\1\2") > self._most:
            raise self._too_many("more entries")
        return data

    def _too_many(self, what: str) -> BadImages:
        message = f"has {what} than the {self._most:,} that are accepted of a zip; send a tar, or an array, instead"
        return BadImages("too_many_entries", message)


_END, _END_BYTES, _LONGEST_COMMENT = b"PK\5\6", 22, 2**16 - 1
_END64, _END64_BYTES, _LOCATOR_BYTES = b"PK\6\6", 56, 20


def _claimed_entries(file: io.FileIO) -> int:
    """How many entries a zip says at its end that it has; 0 where there is no such end.

    APPNOTE.TXT 4.3.14 to 4.3.16: the end of the central directory has the number as 16 bits at 10; a zip64 record
    before it and its locator, where zipfile looks for one, has it as 64 bits at 32.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _LONGEST_COMMENT - _END_BYTES - _LOCATOR_BYTES - _END64_BYTES))
    tail = io.FileIO.read(file)
    file.seek(0)
    place = tail.rfind(_END)
    if place < 0 or len(tail) < place + _END_BYTES:
        return 0
    (entries,) = struct.unpack_from("<H", tail, place + 10)
    before = place - _LOCATOR_BYTES - _END64_BYTES
    if before >= 0 and tail.startswith(_END64, before):
        (entries,) = struct.unpack_from("<Q", tail, before + 32)
    return int(entries)


def _open_zip(file: _ZipFile, name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise BadImages("damaged_archive", f"is a truncated or damaged zip file: {error!s:.200}", name) from error


def _open_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> IO[bytes]:
    try:
        return archive.open(entry)
    except _DAMAGE as error:
        raise BadImages("damaged_archive", f"cannot be unpacked: {error!s:.200}", name) from error


def _checked_entry(entry: zipfile.ZipInfo, archive_bytes: int) -> str:
    """The entry's path. Raises `BadImages` where it is not a plain file or folder that can be read piecewise."""
    name = _checked_name(entry.filename)
    if not 0 <= entry.header_offset < archive_bytes:
        raise BadImages("damaged_archive", "is said to lie outside the archive", name)
    if entry.flag_bits & 1:
        raise BadImages("unsafe_archive", "is encrypted; only archives without a password are read", name)
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise BadImages("unsafe_archive", "is a link or a device; only plain files are read", name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadImages("unsupported_archive", "is compressed in a way that is not read; stored or deflated are", name)
    return name


def _tar(file: IO[bytes] | gzip.GzipFile, source: Path, limits: Limits) -> Iterator[Member]:
    stream = io.BufferedReader(_Metered(file, _Meter(limits, source.stat().st_size), source.name), 2**16)
    if not _is_tar(stream.peek(512)):
        raise BadImages("unsupported_archive", "is compressed but holds no tar archive; .tar.gz is read", source.name)
    for count, entry in enumerate(tar.read_entries(stream), start=1):
        if count > limits.max_entries:
            raise _too_many("entries", limits.max_entries)
        name = _checked_name(entry.name)
        if entry.kind not in (tar.FILE, tar.FOLDER):
            raise BadImages("unsafe_archive", "is a link, a device or a sparse file; only plain files are read", name)
        if entry.kind == tar.FILE and not _is_junk(name):
            yield _inner_member(name, entry.content)


def _is_tar(head: bytes) -> bool:
    empty = len(head) >= 512 and not any(head[:512])
    return empty or head[257:262] == b"ustar"


def _inner_member(name: str, content: io.RawIOBase) -> Member:
    stream: io.BufferedReader = io.BufferedReader(content, 2**16)
    head = stream.peek(512)
    if head.startswith(_ARCHIVES) or head[257:262] == b"ustar":
        raise BadImages("nested_archive", "is an archive inside the archive; put the images into one", name)
    return Member(name, stream)


def _checked_name(name: str) -> str:
    """The entry's path without `./`. Raises `BadImages` where it leads out of the archive."""
    if not name:
        raise BadImages("damaged_archive", "the archive has an entry without a name")
    path = name.replace("\\", "/")
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or parts[0].endswith(":"):
        raise BadImages("unsafe_archive", "leads out of the archive; names must be relative and without ..", name)
    plain = "/".join(part for part in parts if part not in ("", "."))
    return name if plain == name else plain  # one string for both, of which there may be many


def _is_junk(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in _JUNK for part in name.split("/"))


def _too_many(what: str, most: int) -> BadImages:
    code = "too_many_files" if what == "files" else "too_many_entries"
    return BadImages(code, f"has more than the {most:,} {what} that are accepted")
