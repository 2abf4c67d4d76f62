"""Uploads: multipart bodies, with a limit that holds while they arrive; large files are kept on disk."""

import hashlib
import re
import shutil
import tempfile
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import unquote_to_bytes

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser

from api.problems import Unsupported, UploadTooLarge

MAX_FIELDS = 32

_LONGEST_NAME = 200
"""Bytes of a part of a displayed name; a file system takes 255."""

_MOST_FOLDERS = 16
"""Parts of a displayed name: with more, it could be a longer path than a file system takes."""

_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that are escaped in names: control and format characters, lone surrogates, line separators."""

_AS_IS = frozenset({"", "7bit", "8bit", "binary", "identity"})
"""Encodings of a part of a form that leave its bytes as they are."""

_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_EXTENDED = re.compile(rb";\s*filename\*\s*=\s*([A-Za-z0-9_-]*)'[^';]*'([^\s;\"']*)", re.IGNORECASE)
_ENCODED_WORDS = re.compile(rb"(=\?[A-Za-z0-9_-]+\?[BbQq]\?[^?\s]*\?=\s*)+")


@dataclass(frozen=True)
class Form:
    """The text fields of a form, and its files in the order sent: the displayed name and the open file of each.

    Files that were sent with equal names have equal names here; their order distinguishes them. `size` is the number of
    bytes of all files.
    """

    fields: Mapping[str, str]
    files: tuple[tuple[str, IO[bytes]], ...]
    size: int

    def contents(self) -> list[tuple[str, bytes]]:
        """The files, with all that is in them."""
        return [(name, file.read()) for name, file in self.files]


@dataclass(frozen=True)
class Upload:
    """A form with its files on disk: the displayed name and the path of each."""

    fields: Mapping[str, str]
    files: tuple[tuple[str, Path], ...]


@asynccontextmanager
async def received(
    request: Request, file_field: str, max_bytes: int, max_files: int, text_fields: Collection[str] | None = None
) -> AsyncIterator[Form]:
    """The form in the body of `request`, which lasts as long as the block.

    If `text_fields` are given, it may have no other text.

    Raises `Unsupported` for another media type or an encoded part, `UploadTooLarge` as soon as the limit is known to be
    passed, and `RequestValidationError` if the body is no form, repeats a text field or has other files than those of
    `file_field`.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Unsupported(f"send multipart/form-data with the file field {file_field!r}")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise UploadTooLarge(max_bytes)
    parser = _Parser(request.headers, _counted(request, max_bytes), max_files=max_files, max_fields=MAX_FIELDS)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise invalid_field(file_field, error.message) from error
    try:
        fields: dict[str, str] = {}
        files: list[tuple[str, IO[bytes]]] = []
        size = 0
        for name, value in form.multi_items():
            if isinstance(value, str):
                if name == file_field:
                    raise invalid_field(name, "has no filename, so it is a text field; send it as a file")
                if text_fields is not None and name not in text_fields:
                    raise invalid_field(name, "unexpected field")
                if name in fields:
                    raise invalid_field(name, "the form has this field more than once; send it once")
                fields[name] = value
            elif name == file_field:
                files.append((value.filename or "", value.file))
                size += value.size or 0
            else:
                raise invalid_field(name, f"unexpected file; files go in the field {file_field!r}")
        if not files:
            raise invalid_field(file_field, "Field required: at least one file")
        yield Form(fields, tuple(files), size)
    finally:
        await form.close()


@asynccontextmanager
async def saved(form: Form) -> AsyncIterator[Upload]:
    """The form with its files in a temporary directory that lasts as long as the block. `form` loses its files."""
    with tempfile.TemporaryDirectory(prefix="flowpp-upload-") as directory:
        yield await run_in_threadpool(_save, form, Path(directory))


class _Parser(MultiPartParser):
    """Starlette's parser, stricter, and with the names of files from `display_name`.

    Starlette accepts a form without its end and leaves its last file open. It decodes by any charset that the client
    names, and some charsets of Python are no text encodings; here a form is UTF-8. It reads a part that has only
    `filename*` as text.
    """

    _ended = False

    def on_part_begin(self) -> None:
        super().on_part_begin()
        self._charset = "utf-8"

    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition = part.content_disposition or b""
        for header, value in part.item_headers:
            encoding = value.decode("latin-1").strip().lower()
            if header in (b"content-transfer-encoding", b"content-encoding") and encoding not in _AS_IS:
                raise Unsupported(f"a part of the form has {header.decode().title()} {encoding:.40}; send it as it is")
        name = _sent_name(disposition)
        if name is not None:
            part.content_disposition = disposition + b'; filename=""'  # also of a part with `filename*` alone
        super().on_headers_finished()
        if name is not None and part.file is not None:
            part.file.filename = display_name(name)

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode()
            except UnicodeDecodeError as error:
                raise MultiPartException(f"the field {part.field_name:.40} is not in UTF-8: {error.reason}") from error
        super().on_part_end()

    def on_end(self) -> None:
        self._ended = True

    async def parse(self) -> FormData:
        form = await super().parse()
        if not self._ended:
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("the form ends before its last boundary")
        return form


async def _counted(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    arrived = 0
    async for chunk in request.stream():
        arrived += len(chunk)
        if arrived > max_bytes:
            raise UploadTooLarge(max_bytes)
        yield chunk


def _save(form: Form, directory: Path) -> Upload:
    saved = []
    for index, (name, file) in enumerate(form.files):
        path = directory / str(index) / PurePosixPath(name).name  # several files may have one name
        path.parent.mkdir()
        with path.open("xb") as target:
            shutil.copyfileobj(file, target, 2**20)
        file.close()  # the parser's own copy, which would take the disk's room twice
        saved.append((name, path))
    return Upload(form.fields, tuple(saved))


def display_name(filename: bytes) -> str:
    """A user's file name as text, which leads nowhere as a path and is for display only.

    Names that differ stay different, but parts of a path that lead nowhere or out of a folder are dropped. Bytes that
    are not UTF-8, control characters and `\\` are escaped as in Python.
    """
    text = filename.decode("utf-8", "surrogateescape")
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    if len(parts) > _MOST_FOLDERS:
        parts = [parts[0], hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16], parts[-1]]
    return "/".join(_abbreviated("".join(map(_escaped, part))) for part in parts) or "file"


def _escaped(character: str) -> str:
    if character == "\\" or unicodedata.category(character) in _UNPRINTABLE:
        return character.encode("unicode_escape").decode()
    return character


def _abbreviated(name: str) -> str:
    """`name`, or if it is too long its beginning, a hash of it and its end."""
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{name[:30]}...{hashlib.sha256(name.encode()).hexdigest()[:16]}...{name[-12:]}"


def _sent_name(disposition: bytes) -> bytes | None:
    """The file name of a `Content-Disposition` in UTF-8, or in an unknown encoding; None if it has none.

    `filename*` (RFC 8187) comes first, as RFC 6266 says, although RFC 7578 does not provide for it. A `filename` of
    encoded words (RFC 2047), which .NET sends, is decoded.
    """
    if extended := _EXTENDED.search(_QUOTED.sub(b'""', disposition)):
        return _in_utf8(unquote_to_bytes(extended[2]), extended[1].decode())
    name = parse_options_header(disposition)[1].get(b"filename")
    if name is None or not _ENCODED_WORDS.fullmatch(name):
        return name
    try:
        words = decode_header(name.decode("ascii"))
    except (HeaderParseError, ValueError):  # it only looks like encoded words
        return name
    decoded = [_in_utf8(word, charset or "") if isinstance(word, bytes) else word.encode() for word, charset in words]
    return b"".join(decoded) or name


def _in_utf8(name: bytes, charset: str) -> bytes:
    """Converts ISO-8859-1. Bytes in other charsets stay as they are: some charsets of Python are no text encodings."""
    return name.decode("latin-1").encode() if charset.lower() in ("iso-8859-1", "latin1", "us-ascii") else name


def invalid_field(name: str, message: str) -> RequestValidationError:
    """The error for what is wrong with one field of a form."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", name), "msg": message, "input": None}])
