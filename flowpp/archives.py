"""The files inside folders and archives, as streams: nothing is ever unpacked to a path.

Bytes are counted as they come out, whatever the headers claim.
"""

import gzip
import io
import os
import re
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
from flowpp.kinds import HEAD_BYTES, Family, kind_of

_MAX_RATIO = 200  # bytes out for a byte in; pixels of photographs compress by less than 10
_FREE_BYTES = 2**24  # bytes out before the ratio counts
_JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "icon\r"}
_FOLDER = 0x10  # MS-DOS attribute of a zip entry
_UTF8 = 0x800  # general purpose bit of a zip entry: its name is UTF-8
_METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "PPMd"}
_UNICODE_PATH = 0x7075  # extra field of Info-ZIP
_READ = "archives that are read are .zip, .tar and .tar.gz"
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
    stream: "io.BufferedReader[io.RawIOBase]"

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


Source = Path | Sequence[Path] | Sequence[tuple[str, Path]]
"""A folder, an archive or a file; or several files, with names if they were sent under others than their paths have."""


def members(source: Source, limits: Limits) -> Iterator[Member]:
    """The files of a folder, of a .zip, .tar or .tar.gz (by its content), several files, or the one file itself.

    Folders and zip files come sorted by name, a tar in its own order. Hidden files and what macOS and Windows leave
    behind are skipped. Bytes of names that are not UTF-8 are lone surrogates. Raises `BadImages`.
    """
    if not isinstance(source, Path):
        named = [(each, _decoded(each.name)) if isinstance(each, Path) else (each[1], each[0]) for each in source]
        yield from _files(named, limits)
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
        head = file.read(HEAD_BYTES)
        file.seek(0)
        kind = kind_of(head)
        if kind and kind.name == "a zip archive":
            yield from _zip(source, limits)
        elif kind and kind.name == "a gzip file":
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield from _tar(unzipped, source, limits)
        elif tar.is_tar(head):
            yield from _tar(file, source, limits)
        elif kind and kind.family is Family.OTHER_ARCHIVE:
            raise BadImages("unsupported_archive", f"is {kind.name}; {_READ}", source.name)
        else:
            yield from _files([(source, _decoded(source.name))], limits)


def walk(folder: Path, limits: Limits) -> list[tuple[Path, str]]:
    """The files under `folder` that are not passed over, with their paths in it, sorted by those."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not _is_junk(name)]
        for name in folders:
            if Path(parent, name).is_symlink():
                raise BadImages("unsafe_folder", "is a link to a folder, which is not followed", name)
        paths = [Path(parent, name) for name in files if not _is_junk(name)]
        found += [(path, _decoded(path.relative_to(folder).as_posix())) for path in paths]
        if len(found) > limits.max_images:
            raise _too_many("files", limits.max_images)
    return sorted(found, key=lambda item: item[1])


def _decoded(name: str) -> str:
    """Returns a name of the file system decoded as UTF-8, in any locale. Other bytes become lone surrogates."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


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
            yield _member(name, _Metered(file, meter, name))


def _zip(source: Path, limits: Limits) -> Iterator[Member]:
    size = source.stat().st_size
    meter = _Meter(limits, size)
    with _ZipFile(source, limits) as file, _open_zip(file, source.name) as archive:
        entries = sorted(_named_entries(file, archive.infolist()), key=lambda found: found[0])
        names = [_checked_entry(name, entry, size) for name, entry in entries]
        for (original, entry), name in zip(entries, names, strict=True):
            if not _is_folder(original, entry) and not _is_junk(name):
                with _open_entry(archive, entry, name) as content:
                    yield _member(name, _Metered(content, meter, name))


class _ZipFile(io.FileIO):
    """A file that refuses to return a zip directory of too many entries, also if it claims to have fewer.

    zipfile reads the directory in one piece and then makes an object of each entry. Each begins with this signature.

    It also removes the mark of UTF-8 from all names, because zipfile refuses an archive if a marked name is not UTF-8.
    zipfile then decodes all names by code page 437, which loses nothing. `utf8_names` are the names that had the mark.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        super().__init__(path)
        self.utf8_names: set[bytes] = set()
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
        if data.startswith(b"PK\1\2"):
            return self._unmarked(data)
        if size == _LOCAL_HEADER_BYTES and data.startswith(b"PK\3\4"):
            return data[:7] + bytes([data[7] & ~(_UTF8 >> 8)]) + data[8:]
        return data

    def _unmarked(self, directory: bytes) -> bytes:
        """A zip directory without the mark. APPNOTE.TXT 4.3.12: flags at 8, three lengths at 28, the name at 46."""
        found, place = bytearray(directory), 0
        while directory.startswith(b"PK\1\2", place) and place + 46 <= len(directory):
            (flags,) = struct.unpack_from("<H", directory, place + 8)
            name, extra, comment = struct.unpack_from("<3H", directory, place + 28)
            if flags & _UTF8:
                self.utf8_names.add(directory[place + 46 : place + 46 + name])
                struct.pack_into("<H", found, place + 8, flags & ~_UTF8)
            place += 46 + name + extra + comment
        return bytes(found)

    def _too_many(self, what: str) -> BadImages:
        message = f"has {what} than the {self._most:,} that are accepted of a zip; send a tar, or an array, instead"
        return BadImages("too_many_entries", message)


_LOCAL_HEADER_BYTES = 30
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


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _named_entries(file: _ZipFile, entries: Sequence[zipfile.ZipInfo]) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """The entries of a zip with their names.

    The standard has names without a mark in code page 437, but macOS writes UTF-8 then: they are read as UTF-8 if all
    of them can be.
    """
    names = [entry.orig_filename.encode("cp437") for entry in entries]
    encoding = "utf-8" if all(_is_utf8(name) for name in names if name not in file.utf8_names) else "cp437"
    for entry, name in zip(entries, names, strict=True):
        is_marked = name in file.utf8_names and _is_utf8(name)
        yield (
            _unicode_path(entry.extra, name) or name.decode("utf-8" if is_marked else encoding, "surrogateescape"),
            entry,
        )


def _unicode_path(extra: bytes, name: bytes) -> str | None:
    """The name in the extra field for Unicode paths, if it is there and of this `name` (APPNOTE.TXT 4.6.9)."""
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, place)
        content = extra[place + 4 : place + 4 + size]
        if kind == _UNICODE_PATH and content[1:5] == struct.pack("<I", zlib.crc32(name)) and _is_utf8(content[5:]):
            return content[5:].decode()
        place += 4 + size
    return None


def _is_folder(name: str, entry: zipfile.ZipInfo) -> bool:
    """Windows tools end folders with a backslash, or mark them by an attribute only."""
    is_marked = entry.external_attr & _FOLDER or stat.S_ISDIR(entry.external_attr >> 16)
    return name.endswith(("/", "\\")) or bool(is_marked and not entry.file_size)


def _open_zip(file: _ZipFile, name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except NotImplementedError as error:
        raise BadImages("unsupported_archive", f"is a zip of a kind that is not read: {error!s:.200}", name) from error
    except _DAMAGE as error:
        raise BadImages("damaged_archive", f"is a truncated or damaged zip file: {error!s:.200}", name) from error


def _open_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str) -> IO[bytes]:
    try:
        return archive.open(entry)
    except NotImplementedError as error:
        raise BadImages("unsupported_archive", f"is stored in a way that is not read: {error!s:.200}", name) from error
    except _DAMAGE as error:
        raise BadImages("damaged_archive", f"cannot be unpacked: {error!s:.200}", name) from error


def _checked_entry(original: str, entry: zipfile.ZipInfo, archive_bytes: int) -> str:
    """The entry's path. Raises `BadImages` if it is not a plain file or folder that can be read piecewise."""
    name = _checked_name(original, "/\\")
    if not 0 <= entry.header_offset < archive_bytes:
        raise BadImages("damaged_archive", "is said to lie outside the archive", name)
    if entry.flag_bits & 1:
        raise BadImages("unsafe_archive", "is encrypted; only archives without a password are read", name)
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise BadImages("unsafe_archive", "is a link or a device; only plain files are read", name)
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = _METHODS.get(entry.compress_type, f"method {entry.compress_type}")
        raise BadImages("unsupported_archive", f"is compressed by {method}; stored or deflated entries are read", name)
    return name


def _tar(file: IO[bytes] | gzip.GzipFile, source: Path, limits: Limits) -> Iterator[Member]:
    stream = io.BufferedReader(_Metered(file, _Meter(limits, source.stat().st_size), source.name), 2**16)
    head = stream.peek(HEAD_BYTES)
    if not tar.is_tar(head):
        kind = kind_of(head)
        message = f"is gzip of a file that is {kind.name if kind else 'no tar archive'}; send the file itself; {_READ}"
        raise BadImages("unsupported_archive", message, source.name)
    for count, entry in enumerate(tar.read_entries(stream), start=1):
        if count > limits.max_entries:
            raise _too_many("entries", limits.max_entries)
        name = _checked_name(entry.name, "/")
        if entry.kind not in (tar.FILE, tar.FOLDER):
            raise BadImages("unsafe_archive", "is a link, a device or a sparse file; only plain files are read", name)
        if entry.kind == tar.FILE and not _is_junk(name):
            yield _member(name, entry.content)


def _member(name: str, content: io.RawIOBase) -> Member:
    """A file among others. Raises `BadImages` for an archive."""
    stream = io.BufferedReader(content, 2**16)
    head = stream.peek(HEAD_BYTES)
    kind = kind_of(head)
    if (kind and kind.family in (Family.ARCHIVE, Family.OTHER_ARCHIVE)) or (any(head) and tar.is_tar(head)):
        message = f"is an archive among other files ({kind.name if kind else 'tar'}); put the images into one archive"
        raise BadImages("nested_archive", message, name)
    return Member(name, stream)


_WINDOWS_DRIVE = re.compile(r"[A-Za-z]:(?:/|[^/]*$)")


def _checked_name(name: str, separators: str) -> str:
    """The entry's path, with `/` only and without `./`. Raises `BadImages` if it leads out of the archive."""
    if not name.strip("\0"):
        raise BadImages("damaged_archive", "the archive has an entry without a name")
    path = name.replace("\\", "/")
    if path.startswith("/") or ".." in path.split("/") or _WINDOWS_DRIVE.match(path):
        raise BadImages("unsafe_archive", "leads out of the archive; names must be relative and without ..", name)
    parts = (path if "\\" in separators else name).split("/")
    plain = "/".join(part for part in parts if part not in ("", "."))
    return name if plain == name else plain  # one string for both, of which there may be many


def _is_junk(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in _JUNK for part in name.split("/"))


def _too_many(what: str, most: int) -> BadImages:
    code = "too_many_files" if what == "files" else "too_many_entries"
    return BadImages(code, f"has more than the {most:,} {what} that are accepted")
