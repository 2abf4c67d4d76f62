"""Parameters: a query parameter that the endpoint does not have is refused, and so is a single one that is repeated."""

from collections import Counter
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError

PREFIX = "/v1"
"""Of the paths that are so checked; a route itself does not know it."""


async def check_parameters(request: Request) -> None:
    """Raises `RequestValidationError` for query parameters that the OpenAPI document does not have, and for query
    parameters and headers that are sent more than once although they have one value.

    A parameter of style deepObject is written `name[key]=value`.
    """
    _check_headers(request)
    if not request.query_params:
        return
    styles = _styles(request)
    unknown = [name for name in request.query_params if not _is_known(name, styles)]
    if unknown:
        written = [f"{name}[key]" if style == "deepObject" else name for name, style in styles.items()]
        known = f"those of this path are {', '.join(written)}" if written else "this path takes none"
        fault = {"type": "extra_forbidden", "msg": f"no such query parameter; {known}", "input": None}
        raise RequestValidationError([fault | {"loc": ("query", name[:100])} for name in unknown])
    lists = {each["name"] for each in _parameters(request, "query") if _is_list(each)}
    names = Counter(name for name, _ in request.query_params.multi_items() if name not in lists)
    _refuse("query", [name for name, count in names.items() if count > 1])


def _check_headers(request: Request) -> None:
    single = [each["name"] for each in _parameters(request, "header") if not _is_list(each)]
    _refuse("header", [name for name in single if len(request.headers.getlist(name)) > 1])


def _refuse(where: str, repeated: list[str]) -> None:
    if repeated:
        fault = {"type": "value_error", "msg": "the request has this more than once; send it once", "input": None}
        raise RequestValidationError([fault | {"loc": (where, name[:100])} for name in repeated])


def operation_of(request: Request) -> dict[str, Any]:
    """What the OpenAPI document says of the request's operation; nothing where it does not know it."""
    operations = request.app.openapi()["paths"].get(PREFIX + request.scope["route"].path_format, {})
    operation: dict[str, Any] = operations.get("get" if request.method == "HEAD" else request.method.lower(), {})
    return operation


def _styles(request: Request) -> dict[str, str]:
    """The query parameters of the request's operation, in their order, each with its style."""
    return {each["name"]: each.get("style", "form") for each in _parameters(request, "query")}


def _parameters(request: Request, where: str) -> list[dict[str, Any]]:
    return [each for each in operation_of(request).get("parameters", []) if each["in"] == where]


def _is_list(parameter: dict[str, Any]) -> bool:
    schema = parameter["schema"]
    listed = any(each.get("type") == "array" for each in (schema, *schema.get("anyOf", ())))
    return listed or bool(schema.get("x-repeatable"))


def _is_known(name: str, styles: dict[str, str]) -> bool:
    before, bracket, _ = name.partition("[")
    if not bracket or not name.endswith("]"):
        return styles.get(name) == "form"
    return styles.get(before) == "deepObject"
