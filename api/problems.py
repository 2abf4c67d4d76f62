"""Errors on the wire: RFC 9457 problem documents, each with a stable code."""

import errno
import logging
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from api.errors import uri_of
from api.fields import unknown
from api.observation import REQUEST_ID, request_id_of
from api.redaction import redacted
from flowpp.data import BadImages
from flowpp.logs import about
from worker.artifacts import DamagedArtifact
from worker.connection import UNREACHABLE, ServerState
from worker.object_store import StoreUnavailable
from worker.refusals import Conflict, Invalid, NotFound, OverQuota, QueueFull, Refusal

MEDIA_TYPE = "application/problem+json"

logger = logging.getLogger(__name__)


def _encodable(text: str) -> str:
    """`text` with lone surrogates escaped: JSON can write them, and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


Text = Annotated[str, BeforeValidator(_encodable)]
"""Text of a problem, which may quote anything that a client has sent."""


class FieldProblem(BaseModel):
    """What is wrong with one field."""

    path: Text = Field(description="Dotted path of the field in the request.", examples=["training.learning_rate"])
    detail: Text = Field(examples=["Input should be less than or equal to 1"])


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field(description="Leads to what is said of the code.", examples=[uri_of("invalid_request")])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: Text = Field(description="A sentence: what was wrong, where, and what would be right.")
    code: str = Field(description="Stable, for programs; /docs/errors lists all.", examples=["invalid_request"])
    instance: Text = Field(description="The path of the request.")
    request_id: str = Field(description="The service's log names it; the answer's X-Request-ID, too.")
    errors: list[FieldProblem] = []


class UploadTooLarge(Exception):
    """A body beyond its limit in bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than the limit of {limit:,} bytes")


class RangeNotSatisfiable(Exception):
    """A `Range` beyond the end of a file of so many bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the file has {size:,} bytes; the range asked for is not within them")
        self.size = size


class Unsupported(Exception):
    """A body of a media type that the endpoint does not take; the message says which it does."""


def problem(
    request: Request, status: int, code: str, detail: str, *, errors: Any = (), headers: dict[str, str] | None = None
) -> JSONResponse:
    """The response for one problem."""
    content = Problem(
        type=uri_of(code),
        title=HTTPStatus(status).phrase,
        status=status,
        detail=redacted(detail),
        code=code,
        instance=redacted(request.url.path),
        request_id=request_id_of(request),
        errors=[FieldProblem(path=redacted(each.path), detail=redacted(each.detail)) for each in errors],
    )
    return JSONResponse(content.model_dump(), status, headers=headers, media_type=MEDIA_TYPE)


def not_json(error: Exception) -> RequestValidationError:
    """The error for a body that cannot be read as JSON: damaged, of another encoding, or nested without end."""
    where = {"type": "json_invalid", "loc": ("body",), "msg": f"{error!s:.200}", "input": None}
    return RequestValidationError([where])


STATUS: dict[type[Refusal], int] = {OverQuota: 403, NotFound: 404, Conflict: 409, Invalid: 422, QueueFull: 429}
CODE_OF_STATUS = {
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    503: "too_many_uploads",
}
_WHERE = ("body", "query", "path", "header")
_LONGEST_NAME = 100
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


async def unreachable(request: Request, error: Exception) -> JSONResponse:
    """The answer while Redis cannot be reached, or refuses commands."""
    why = f"Redis refuses commands, as {error.meaning}" if isinstance(error, ServerState) else "it cannot reach Redis"
    detail = f"the service has to wait: {why}; try again in a while"
    return problem(request, 503, "redis_unreachable", detail, headers={"Retry-After": "5"})


def install(app: FastAPI) -> None:
    """Makes every error of `app` a problem document."""

    @app.exception_handler(Refusal)
    def refused(request: Request, error: Refusal) -> JSONResponse:
        status = next(status for kind, status in STATUS.items() if isinstance(error, kind))
        field = error.field if isinstance(error, Invalid) else None
        errors = [FieldProblem(path=field, detail=str(error))] if field else []
        headers = {"Retry-After": str(error.retry_after)} if isinstance(error, QueueFull) else None
        return problem(request, status, error.code, str(error), errors=errors, headers=headers)

    @app.exception_handler(BadImages)
    def bad_images(request: Request, error: BadImages) -> JSONResponse:
        status = 413 if error.code == "too_large" else 422
        return problem(request, status, error.code, str(error))

    @app.exception_handler(UploadTooLarge)
    def too_large(request: Request, error: UploadTooLarge) -> JSONResponse:
        # what is still to come of the body is not read
        return problem(request, 413, "body_too_large", str(error), headers={"Connection": "close"})

    @app.exception_handler(RangeNotSatisfiable)
    def beyond(request: Request, error: RangeNotSatisfiable) -> JSONResponse:
        headers = {"Content-Range": f"bytes */{error.size}"}
        return problem(request, 416, "range_not_satisfiable", str(error), headers=headers)

    @app.exception_handler(Unsupported)
    def unsupported(request: Request, error: Unsupported) -> JSONResponse:
        return problem(request, 415, "unsupported_media_type", str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [_field(request, each) for each in error.errors()[:20]]
        first = errors[0]
        return problem(request, 422, "invalid_request", f"{first.path}: {first.detail}", errors=errors)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400 and isinstance(error.__cause__, ValueError | RecursionError):
            return invalid(request, not_json(error.__cause__))  # FastAPI knows one of the ways to be no JSON only
        code = CODE_OF_STATUS.get(error.status_code, "http_error")
        detail = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers) if error.headers else {}
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(_methods(request)))
        return problem(request, error.status_code, code, detail, headers=headers)

    @app.exception_handler(OSError)
    def full(request: Request, error: OSError) -> JSONResponse:
        if error.errno not in NO_SPACE:
            raise error
        logger.error("no space for what %s sends: %s", request.url.path, error)
        return problem(
            request, 507, "disk_full", "the service has no space left for this", headers={"Retry-After": "60"}
        )

    @app.exception_handler(ClientDisconnect)
    def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return problem(request, 400, "disconnected", "the body ended before all of it was sent")  # nobody reads it

    for kind in UNREACHABLE:
        app.add_exception_handler(kind, unreachable)

    @app.exception_handler(DamagedArtifact)
    def damaged(request: Request, error: DamagedArtifact) -> JSONResponse:
        logger.error("%s", error)
        return problem(request, 500, "artifact_damaged", str(error))

    @app.exception_handler(StoreUnavailable)
    def store_unavailable(request: Request, error: StoreUnavailable) -> JSONResponse:
        logger.error("%s", error)
        detail = "the service cannot reach its artifact store; try again in a while"
        return problem(request, 503, "store_unavailable", detail, headers={"Retry-After": "5"})

    @app.exception_handler(Exception)
    def internal(request: Request, error: Exception) -> JSONResponse:
        reference = request_id_of(request)
        path = redacted(request.url.path)
        with about(request_id=reference):
            logger.error("request %s failed: %s %s", reference, request.method, path, exc_info=error)
        detail = f"the service failed; its log tells why under {reference}"
        # Starlette answers so around all middleware, which would add the header
        return problem(request, 500, "internal_error", detail, headers={REQUEST_ID: reference})


def _methods(request: Request) -> set[str]:
    """What the path of `request` takes; Starlette tells its first route's methods only."""
    scope = {"type": "http", "path": request.scope["path"], "root_path": "", "headers": []}
    return {
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        for route in request.app.routes
        if route.matches(scope | {"method": method})[0] is Match.FULL
    }


def _field(request: Request, error: Any) -> FieldProblem:
    if error["type"] == "json_invalid":
        why = error.get("ctx", {}).get("error", error["msg"])
        return FieldProblem(path="body", detail=f"the body is not JSON: {why}")
    where, *location = error["loc"]
    if where not in _WHERE:
        location = [where, *location]
    detail = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden" and where == "body":
        detail = unknown(request, location)
    return FieldProblem(path=".".join(str(part)[:_LONGEST_NAME] for part in location) or "body", detail=detail)
