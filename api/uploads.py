"""Uploads: multipart bodies, with a limit that holds while they arrive; large files are kept on disk."""

import re
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser

from api.problems import Unsupported, UploadTooLarge

MAX_FIELDS = 32

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class Form:
    """The text fields of a form, and its files in the order sent: what each is called, and where it is read.

    `size`, in bytes, is that of all files.
    """

    fields: Mapping[str, str]
    files: tuple[tuple[str, IO[bytes]], ...]
    size: int

    def contents(self) -> list[tuple[str, bytes]]:
        """The files, with all that is in them."""
        return [(name, file.read()) for name, file in self.files]


@dataclass(frozen=True)
class Upload:
    """A form with its files on disk: what each is called, and where it lies."""

    fields: Mapping[str, str]
    files: tuple[tuple[str, Path], ...]


@asynccontextmanager
async def received(
    request: Request, file_field: str, max_bytes: int, max_files: int, text_fields: Collection[str] | None = None
) -> AsyncIterator[Form]:
    """The form in the body of `request`, which lasts as long as the block.

    It may have no other text than `text_fields`, where those are said.

    Raises `Unsupported` for another media type, `UploadTooLarge` as soon as the limit is known to be passed, and
    `RequestValidationError` for what is no form or has other files than those of `file_field`.
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
                if text_fields is not None and name not in text_fields:
                    raise invalid_field(name, "unexpected field")
                fields[name] = value
            elif name == file_field:
                files.append((display_name(value.filename or ""), value.file))
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
    """The form with its files in a temporary directory that goes with the block; they are read no more from `form`."""
    with tempfile.TemporaryDirectory(prefix="flowpp-upload-") as directory:
        yield Upload(form.fields, await run_in_threadpool(_save, form, Path(directory)))


class _Parser(MultiPartParser):
    """Starlette's, which takes a form without its end for a whole one, and leaves its last file open."""

    _ended = False

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


def _save(form: Form, directory: Path) -> tuple[tuple[str, Path], ...]:
    saved = []
    for index, (name, file) in enumerate(form.files):
        folder = directory / str(index)  # two files may have one name
        folder.mkdir()
        with (folder / name).open("xb") as target:
            shutil.copyfileobj(file, target, 2**20)
        file.close()  # the parser's own copy, which would take the disk's room twice
        saved.append((name, folder / name))
    return tuple(saved)


def display_name(filename: str) -> str:
    """A user's file name without folders and odd characters: it says what a file is and leads nowhere."""
    base = PureWindowsPath(PurePosixPath(filename).name).name
    return _UNSAFE.sub("_", base).lstrip(".")[-100:] or "file"


def invalid_field(name: str, message: str) -> RequestValidationError:
    """The error for what is wrong with one field of a form."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", name), "msg": message, "input": None}])
