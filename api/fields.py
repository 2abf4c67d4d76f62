"""Fields of request bodies: what to say of one that the endpoint does not have."""

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request

from api.queries import operation_of
from flowpp.names import meant


def unknown(request: Request, location: Sequence[str | int]) -> str:
    """What to say of the field at `location` of the body: those that it may be meant for, else those that there are."""
    content = operation_of(request).get("requestBody", {}).get("content", {})
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    schemas = request.app.openapi().get("components", {}).get("schemas", {})
    places = [content.get(media_type, {}).get("schema", {})]
    for part in location[:-1]:
        places = [child for place in places for child in _children(place, part, schemas)]
    known = list(dict.fromkeys(name for place in places for name in _properties(place, schemas)))
    near = meant(str(location[-1]), known)
    return f"no such field; {near}" if near else "no such field"


def _children(schema: Any, part: str | int, schemas: dict[str, Any]) -> Iterator[Any]:
    for each in _alternatives(schema, schemas):
        child = each.get("items") if isinstance(part, int) else each.get("properties", {}).get(part)
        if child is not None:
            yield child


def _properties(schema: Any, schemas: dict[str, Any]) -> Iterator[str]:
    for each in _alternatives(schema, schemas):
        yield from each.get("properties", {})


def _alternatives(schema: Any, schemas: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a value of the schema may be: itself, without references, and each of what it is one of."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[-1]]
    yield schema
    for word in ("anyOf", "oneOf", "allOf"):
        for each in schema.get(word, []):
            yield from _alternatives(each, schemas)
