"""The list of error codes, to which the `type` of each problem leads."""

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from api.errors import PAGE, as_html

router = APIRouter(include_in_schema=False)


@router.get(PAGE)
async def error_codes() -> HTMLResponse:
    """A page of plain HTML."""
    return HTMLResponse(as_html())
