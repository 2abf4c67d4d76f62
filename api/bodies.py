"""Bodies: JSON, and of requests for inference also a form whose files are images."""

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from api.deadlines import JobCreation
from api.problems import Unsupported, not_json
from api.submissions import Submissions
from api.uploads import Form, invalid_field, received
from flowpp.data import read_images
from worker.jobs import Job
from worker.requests import LikelihoodRequest, SamplingRequest
from worker.service import Service
from worker.submission import Prepared, Terms

Wanted = TypeVar("Wanted", LikelihoodRequest, SamplingRequest)


async def check_body(request: Request) -> None:
    """Checks a body that FastAPI reads as JSON more strictly than FastAPI.

    Raises `Unsupported` if its media type is another one or is missing, and `RequestValidationError` as `_json`.
    """
    route: APIRoute = request.scope["route"]
    if route.body_field is None:
        return
    if _media_type(request) != "application/json":
        raise Unsupported("send application/json, and say so in the header Content-Type")
    await _json(request)


PrepareJob = Callable[[Service, Wanted, np.ndarray | None, list[str], Terms], Prepared]


async def submit(creation: JobCreation, kind: type[Wanted], prepare: PrepareJob[Wanted]) -> Job:
    """Submits what the body asks for, with the images that came in its field `files`, in a thread, and once.

    Raises `Unsupported`, `UploadTooLarge`, `RequestValidationError`, `flowpp.data.BadImages` and what `prepare`,
    `api.submissions.Submissions` and entering `creation` raise.
    """
    request, service = creation.request, creation.service
    submissions: Submissions = request.app.state.submissions
    media_type = _media_type(request)
    async with creation:
        if media_type == "application/json":
            wanted = _parsed(kind, await _json(request))
            return await submissions(lambda: _prepare_once(creation, prepare, wanted), len(await request.body()))
        if media_type != "multipart/form-data":
            raise Unsupported("send application/json, or multipart/form-data with images in the field 'files'")
        settings = service.settings
        async with received(request, "files", settings.max_request_bytes, settings.max_request_images) as form:

            def with_images() -> Prepared | Job:
                wanted = _parsed(kind, _values(form))
                service.checkpoints.resolve(wanted.model, creation.caller.sees)  # before the images are decoded
                return _prepare_once(creation, prepare, wanted, form.contents())

            return await submissions(with_images, form.size)


def _prepare_once(
    creation: JobCreation,
    prepare: PrepareJob[Wanted],
    wanted: Wanted,
    files: list[tuple[str, bytes]] | None = None,
) -> Prepared | Job:
    service, terms = creation.service, creation.terms(wanted.model_dump(mode="json"), files or [])
    if creation.existing:
        return service.jobs.get(creation.existing)
    if files is None:
        return prepare(service, wanted, None, [], terms)
    images = read_images(files, limits=service.settings.request_limits)
    return prepare(service, wanted, images, [name for name, _ in files], terms)


def openapi(kind: type[BaseModel], example: dict[str, Any], files: str, in_forms: set[str]) -> dict[str, Any]:
    """How OpenAPI describes such a body: `kind` as JSON, or its fields `in_forms` beside the images."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    fields = {name: field for name, field in schema["properties"].items() if name in in_forms}
    images = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}, "description": files}
    form = {
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "files"],
        "properties": {**fields, "files": images},
        "patternProperties": {r"^metadata\[.{1,64}\]$": {"type": "string", "maxLength": 512}},
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _without_definitions(schema), "example": example},
                "multipart/form-data": {"schema": form},
            },
        }
    }


def _without_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with what it refers to in place, as a route's own schema may hold no definitions."""
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(definitions[node["$ref"].rsplit("/", 1)[-1]])
            return {name: resolved(value) for name, value in node.items()}
        return [resolved(each) for each in node] if isinstance(node, list) else node

    return resolved(schema)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _json(request: Request) -> Any:
    """The body. Raises `RequestValidationError` if it is not JSON, or if an object in it has a name twice."""
    try:
        return json.loads(await request.body(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise not_json(error) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise invalid_field(name[:100], "an object of the body has this name more than once; write it once")
        found[name] = value
    return found


def _parsed(kind: type[Wanted], values: Any) -> Wanted:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(_in_body(error)) from error


def _in_body(error: ValidationError) -> list[dict[str, Any]]:
    return [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)]


_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)


def _values(form: Form) -> dict[str, Any]:
    """A form's fields, with those called `metadata[name]` under `metadata`."""
    found = {name: _METADATA.fullmatch(name) for name in form.fields}
    values: dict[str, Any] = {name: value for name, value in form.fields.items() if not found[name]}
    if metadata := {match[1]: form.fields[name] for name, match in found.items() if match}:
        values.setdefault("metadata", metadata)  # a field of that very name is refused as what it is
    return values
