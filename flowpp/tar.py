"""Tar entries read from a stream, one after the other, in memory that no archive can raise.

Python's tarfile keeps every entry, reads extension headers of any size whole, and before 3.11.10 parses them in
quadratic time. This one knows what image archives need: files, folders, long names (GNU and PAX).
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from flowpp.images import BadImages

FILE, FOLDER = b"0", b"5"

_BLOCK = 512
_MAX_EXTENSION = 2**16  # bytes of a PAX or long-name header; a path has at most 4,096


class Content(io.RawIOBase):
    """The next `size` bytes of a stream."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self.remaining = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # any writable buffer
        data = self._stream.read(min(len(buffer), self.remaining))
        if not data and self.remaining and len(buffer):
            raise BadImages("damaged_archive", "the archive ends inside an entry")
        buffer[: len(data)] = data
        self.remaining -= len(data)
        return len(data)

    def skip(self, padding: int) -> None:
        """Reads what is left, and the padding after it."""
        self.remaining += padding
        while self.remaining:
            self.read(min(self.remaining, 2**16))


@dataclass(frozen=True)
class Entry:
    """One entry: `kind` is the type flag, `FILE` or `FOLDER` or one of those that are no plain content."""

    name: str
    kind: bytes
    content: Content


def is_tar(head: bytes) -> bool:
    """Returns True if a file begins with a tar header of any format, or with the end marker of an empty archive."""
    if len(head) < _BLOCK:
        return False
    try:
        return not any(head[:_BLOCK]) or head[257:262] == b"ustar" or _checked_size(head[:_BLOCK]) >= 0
    except BadImages:
        return False


def read_entries(stream: BinaryIO) -> Iterator[Entry]:
    """The entries of an uncompressed tar stream; each must be used before the next is asked for.

    Raises `BadImages` where the archive is damaged or ends early.
    """
    extension: dict[str, str] = {}  # what PAX and long-name headers say of the next entry
    while any(header := stream.read(_BLOCK)):
        size = _checked_size(header)
        kind = header[156:157].replace(b"\0", FILE)
        if kind in (b"x", b"L", b"K", b"g"):
            data = _extension(stream, size)
            if kind == b"x":
                extension |= _pax(data)
            elif kind == b"L":
                extension["path"] = _text(data)
            continue
        name = extension.get("path") or _name(header)
        size = _decimal(extension["size"]) if "size" in extension else size
        if any(key.startswith("GNU.sparse") for key in extension):
            kind = b"S"
        extension = {}
        content = Content(stream, size)
        yield Entry(name, FOLDER if name.endswith("/") else kind, content)
        content.skip(-size % _BLOCK)
    if len(header) < _BLOCK:
        raise _damaged("ends without an end marker; it was cut short")
    while rest := stream.read(2**16):
        if any(rest):
            raise _damaged("goes on after its end marker")


def _checked_size(header: bytes) -> int:
    if len(header) < _BLOCK:
        raise _damaged("ends inside a header")
    blank = header[:148] + b" " * 8 + header[156:]
    if _number(header[148:156]) != sum(blank):
        raise _damaged("has a header with a wrong checksum")
    return _number(header[124:136])


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 where the first byte is 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _decimal(field.strip(b" \0").decode("latin-1") or "0", base=8)


def _decimal(digits: str, base: int = 10) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        raise _damaged(f"has {digits[:20]!r} where a number belongs")
    try:
        return int(digits, base)
    except ValueError as error:
        raise _damaged(f"has {digits!r} where an octal number belongs") from error


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(data: bytes) -> str:
    """Decodes a name, which can be in any encoding: bytes that are not UTF-8 become lone surrogates, without loss."""
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _extension(stream: BinaryIO, size: int) -> bytes:
    if size > _MAX_EXTENSION:
        raise _damaged(f"has an extension header of {size:,} bytes; at most {_MAX_EXTENSION:,} are read")
    padded = stream.read(size + -size % _BLOCK)
    if len(padded) < size:
        raise _damaged("ends inside an extension header")
    return padded[:size]


def _pax(data: bytes) -> dict[str, str]:
    """Records `length key=value newline`, the length counting all of it."""
    records = {}
    while data:
        digits, space, _ = data[:12].partition(b" ")
        length = _decimal(digits.decode("latin-1"))
        record = data[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not (space and equals and length <= len(data) and value.endswith(b"\n")):
            raise _damaged("has a PAX header that cannot be read")
        records[_text(key)] = value[:-1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _damaged(what: str) -> BadImages:
    return BadImages("damaged_archive", f"the archive {what}")
