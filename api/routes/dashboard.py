"""The dashboard: a page of plain HTML, CSS and JavaScript that asks for everything under /v1, as anyone may."""

import hashlib
import mimetypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

from api.routes.artifacts import ConditionsOf

router = APIRouter(include_in_schema=False)

FILES = Path(__file__).parents[1] / "dashboard"
PAGE = "index.html"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # each time it is asked for anew, by its tag
}

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class File:
    """One of the dashboard's files."""

    content: bytes
    media_type: str
    etag: str


@lru_cache(maxsize=1)
def files() -> dict[str, File]:
    """The dashboard's files, by their path within it: the few that there are, and nothing else of the disk."""
    found = {}
    for path in sorted(FILES.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            media_type = _MEDIA_TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "text/plain"
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            found[path.relative_to(FILES).as_posix()] = File(content, media_type, etag)
    return found


@router.get("/")
async def page(conditions: ConditionsOf) -> Response:
    """The page itself."""
    return _answer(PAGE, conditions)


@router.get("/dashboard/{name:path}")
async def file(name: str, conditions: ConditionsOf) -> Response:
    """What the page consists of."""
    return _answer(name, conditions)


def _answer(name: str, conditions: ConditionsOf) -> Response:
    if name not in files():
        raise HTTPException(404, f"the dashboard has no file {name[:256]!r}")
    found = files()[name]
    headers = HEADERS | {"ETag": found.etag}
    if conditions.is_known(found.etag):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
