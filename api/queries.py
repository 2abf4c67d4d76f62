"""Query strings: a parameter that the endpoint does not have is refused, not passed over."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError

PREFIX = "/v1"
"""Of the paths that are so checked; a route itself does not know it."""


async def check_query(request: Request) -> None:
    """Raises `RequestValidationError` where the request has query parameters that the OpenAPI document does not know.

    One of style deepObject is written `name[key]=value`.
    """
    if not request.query_params:
        return
    styles = _styles(request)
    unknown = [name for name in request.query_params if not _is_known(name, styles)]
    if unknown:
        written = [f"{name}[key]" if style == "deepObject" else name for name, style in styles.items()]
        known = f"those of this path are {', '.join(written)}" if written else "this path takes none"
        fault = {"type": "extra_forbidden", "msg": f"no such query parameter; {known}", "input": None}
        raise RequestValidationError([fault | {"loc": ("query", name[:100])} for name in unknown])


def operation_of(request: Request) -> dict[str, Any]:
    """What the OpenAPI document says of the request's operation; nothing where it does not know it."""
    operations = request.app.openapi()["paths"].get(PREFIX + request.scope["route"].path_format, {})
    operation: dict[str, Any] = operations.get("get" if request.method == "HEAD" else request.method.lower(), {})
    return operation


def _styles(request: Request) -> dict[str, str]:
    """The query parameters of the request's operation, in their order, each with its style."""
    parameters = operation_of(request).get("parameters", [])
    return {each["name"]: each.get("style", "form") for each in parameters if each["in"] == "query"}


def _is_known(name: str, styles: dict[str, str]) -> bool:
    before, bracket, _ = name.partition("[")
    if not bracket or not name.endswith("]"):
        return styles.get(name) == "form"
    return styles.get(before) == "deepObject"
