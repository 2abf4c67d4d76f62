"""The files that jobs have left."""

import mimetypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import WithJsonSchema

from api.dependencies import JobOf, ServiceOf
from api.problems import RangeNotSatisfiable
from api.schemas import Artifact, ListOf, as_list
from worker.artifacts import Manifest
from worker.paging import Page
from worker.refusals import NotFound
from worker.service import Service

router = APIRouter(prefix="/jobs", tags=["jobs"])

_PIECE_BYTES = 2**20
_MOST_AT_ONCE = 2**24  # bytes of a file that is verified before it is sent
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{1,18})|bytes=(\d{1,18})-")

FILE = {
    200: {"content": {"*/*": {}}, "description": "The file."},
    206: {"content": {"*/*": {}}, "description": "The part of it that `Range` asks for."},
    304: {"description": "It is still the one that `If-None-Match` names."},
}


AS_ONE = WithJsonSchema({"type": "string", "x-repeatable": True})
"""A header that is a list may be sent as one line, with commas, or as several (RFC 9110, 5.3)."""


@dataclass(frozen=True)
class Conditions:
    """What a request for a file asks of it."""

    if_none_match: Annotated[
        list[str] | None, AS_ONE, Header(description="Answer 304 if the file is one of these.")
    ] = None
    range: Annotated[str | None, Header(description="`bytes=FIRST-LAST`: only this part, as 206.")] = None
    if_range: Annotated[str | None, Header(description="The whole file, where it is another than this one.")] = None

    def is_known(self, etag: str) -> bool:
        """Whether the caller has the file of this tag already."""
        tags = {tag.strip().removeprefix("W/") for tag in ",".join(self.if_none_match or ()).split(",")}
        return bool(tags & {etag, "*"})

    def part(self, etag: str, size: int) -> tuple[int, int] | None:
        """First byte, and behind the last, of the part to send.

        None is the whole file: also for several parts at once, and for what is no range (RFC 9110, 14.2). Raises
        `RangeNotSatisfiable`.
        """
        found = _RANGE.fullmatch(self.range or "")
        if found is None or self.if_range not in (None, etag):
            return None
        first, last, from_here = found.groups()
        if from_here:
            start, end = int(from_here), size
        elif first:
            start, end = int(first), min(size, int(last) + 1)
            if int(last) < start:
                return None
        else:
            start, end = max(0, size - int(last)), size
        if start >= end:
            raise RangeNotSatisfiable(size)
        return start, end

    def check(self, request: Request, etag: str, size: int) -> None:
        """Leaves of the request's range what Starlette's `FileResponse` sends as `part` says; of HEAD, which has none
        (RFC 9110, 14.2), nothing.

        Raises `RangeNotSatisfiable`.
        """
        if request.method == "HEAD" or self.part(etag, size) is None:
            request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]


ConditionsOf = Annotated[Conditions, Depends()]


@router.get("/{job_id}/artifacts")
def artifacts(job: JobOf, service: ServiceOf) -> ListOf[Artifact]:
    """The files that a job has left: a training job's from its first checkpoint on."""
    files = service.artifacts(job).files if job.artifacts else {}
    shown = [
        Artifact(id=name, name=name, bytes=file.bytes, sha256=file.sha256, url=f"/v1/jobs/{job.id}/artifacts/{name}")
        for name, file in sorted(files.items())
    ]
    return ListOf[Artifact](**as_list(Page(shown, False)))


@router.get("/{job_id}/artifacts/{name:path}", response_class=Response, responses=FILE)  # type: ignore[arg-type]
def artifact(
    request: Request,
    name: Annotated[str, Path(description="One of the names that the list of artifacts has.")],
    job: JobOf,
    service: ServiceOf,
    conditions: ConditionsOf,
) -> Response:
    """Fetch one file. Its ETag is its sha256; parts are served, and conditions heard.

    Of a file that was damaged in the store nothing is sent, or of a large one not the end.
    """
    manifest: Manifest = service.artifacts(job)
    if name not in manifest.files:
        raise NotFound("artifact_not_found", f"job {job.id} has left no artifact {name[:256]!r}")
    file = manifest.files[name]
    etag = f'"{file.sha256}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if conditions.is_known(etag):
        return Response(status_code=304, headers=headers)
    media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
    if name.endswith(".jsonl"):
        media_type = "application/jsonl"
    if service.store.directory is not None:
        conditions.check(request, etag, file.bytes)
        return FileResponse(service.store.path(job.artifacts, name), media_type=media_type, headers=headers)
    headers["Accept-Ranges"] = "bytes"
    if request.method == "HEAD":  # nothing is fetched
        return Response(media_type=media_type, headers=headers | {"Content-Length": str(file.bytes)})
    if part := conditions.part(etag, file.bytes):
        return _part(service, job.artifacts, name, *part, file.bytes, headers, media_type)
    if file.bytes <= _MOST_AT_ONCE:
        return Response(service.store.read(job.artifacts, name), media_type=media_type, headers=headers)
    headers["Content-Length"] = str(file.bytes)  # a damaged one ends before it
    return StreamingResponse(service.store.pieces(job.artifacts, name), media_type=media_type, headers=headers)


def _part(
    service: Service, prefix: str, name: str, start: int, end: int, size: int, headers: dict[str, str], media_type: str
) -> Response:
    """The bytes of a stored file from `start` to before `end`, which are not verified."""

    def pieces() -> Iterator[bytes]:
        with service.store.open(prefix, name) as file:
            file.seek(start)
            left = end - start
            while left and (piece := file.read(min(_PIECE_BYTES, left))):
                left -= len(piece)
                yield piece

    headers = headers | {"Content-Length": str(end - start), "Content-Range": f"bytes {start}-{end - 1}/{size}"}
    return StreamingResponse(pieces(), 206, media_type=media_type, headers=headers)
