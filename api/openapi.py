"""The OpenAPI document: FastAPI's, with who may ask, and what each operation may refuse, told by what it takes."""

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI

from api.problems import MEDIA_TYPE

PROBLEM = {"$ref": "#/components/schemas/Problem"}

_SECONDS = {"schema": {"type": "integer", "minimum": 0}, "description": "Seconds until it may be worth another try."}
_RETRY_AFTER = {"Retry-After": _SECONDS}

REFUSALS: dict[int, tuple[str, dict[str, Any]]] = {
    401: (
        "No key was sent, or none that opens anything.",
        {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "How to send one."}},
    ),
    403: ("The key's scope, its owner's quota, or where the request came from does not allow it.", {}),
    404: ("There is no such object, or it is another owner's.", {}),
    408: ("The body came too slowly.", {}),
    409: ("The object's state does not allow it, or the same request is under way.", {}),
    413: ("The body, or what it holds, is too large.", {}),
    415: (
        "The body has another media type than those that are accepted, or it is compressed.",
        {"Accept-Encoding": {"schema": {"type": "string"}, "description": "`identity`, if the body is compressed."}},
    ),
    416: ("The file ends before the range asked for.", {}),
    422: ("Something in the request is not as it must be; `errors` names fields.", {}),
    429: ("Too many requests of this key, or too many jobs wait.", _RETRY_AFTER),
    503: (
        "The service cannot reach Redis, Redis refuses commands, or too many uploads are under way.",
        _RETRY_AFTER,
    ),
    507: ("The service has no space left to take the body.", {}),
}
"""What it means where an operation answers so, and the headers that say more."""


KEYS = {
    "HTTPBearer": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "flowpp_...",
        "description": "A key that `flowpp keys create` made; needed wherever the service is reached over a network.",
    }
}
"""What `api.auth.Identification` checks before any endpoint is reached: a dependency of each would do nothing."""


def install(app: FastAPI) -> None:
    """Makes `app.openapi` document keys and refusals."""
    plain: Callable[[], dict[str, Any]] = app.openapi

    def documented() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            document["components"]["securitySchemes"] = KEYS
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    _document(path, method, operation)
            app.openapi_schema = _plain(document)
        return app.openapi_schema

    app.openapi = documented  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _document(path: str, method: str, operation: dict[str, Any]) -> None:
    """Adds that it takes a key, and the problems that it may answer with, where it does not say more of them itself."""
    responses = operation["responses"]
    responses.pop("4XX", None)
    if path.startswith("/v1/"):
        operation["security"] = [{name: []} for name in KEYS]
        for status in _statuses(method, operation):
            description, headers = REFUSALS[status]
            answer = {"description": description, "content": {MEDIA_TYPE: {"schema": PROBLEM}}}
            responses.setdefault(str(status), answer | ({"headers": headers} if headers else {}))
    operation["responses"] = dict(sorted(responses.items()))


def _statuses(method: str, operation: dict[str, Any]) -> Iterator[int]:
    parameters, body = operation.get("parameters", []), "requestBody" in operation
    yield from (401, 403, 422, 429, 503)
    if body or any(parameter["in"] == "path" or parameter["name"] == "after" for parameter in parameters):
        yield 404
    if method != "get":
        yield 409
    if body:
        yield from (408, 413, 415, 507)
    if "206" in operation["responses"]:
        yield 416


def _plain(node: Any) -> Any:
    """What more tools understand: `prefixItems` of one schema as `items`, and whole numbers without rounding."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if isinstance(node, float) and node.is_integer():
        return int(node)
    if not isinstance(node, dict):
        return node
    found = {name: _plain(value) for name, value in node.items()}
    items = found.get("prefixItems")
    if isinstance(items, list) and all(item == items[0] for item in items):
        del found["prefixItems"]
        found["items"] = items[0]
    return found
