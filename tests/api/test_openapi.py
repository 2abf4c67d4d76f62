"""The OpenAPI document describes each field of a request."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from flowpp.config import SHAPE_FIELDS, DequantizerConfig, Frozen, ModelConfig, TrainingConfig


@pytest.fixture(scope="module")
def document(lasting_http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = lasting_http.get("/openapi.json").json()
    return found


def properties(
    schema: dict[str, Any], document: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each property at any depth, with its path."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    for name, found in schema.get("properties", {}).items():
        yield f"{path}.{name}", found
        yield from properties(found, document, f"{path}.{name}")
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ()), schema.get("items")):
        if isinstance(part, dict):
            yield from properties(part, document, path)


def test_each_property_of_each_request_has_a_description(document: dict[str, Any]) -> None:
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                where = f"{method} {path} {media_type} "
                found += [(where + name, field) for name, field in properties(content["schema"], document)]
    assert len(found) > 80
    assert not [name for name, field in found if not field.get("description")]


def test_each_parameter_has_a_description(document: dict[str, Any]) -> None:
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    found = [parameter for operation in operations for parameter in operation.get("parameters", [])]
    assert len(found) > 50
    assert not [each for each in found if not (each.get("description") or each["schema"].get("description"))]


BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxItems", "minItems", "enum", "pattern"}


@pytest.mark.parametrize(
    ("group", "declared"),
    [("TrainingOverrides", TrainingConfig), ("ModelChoice", ModelConfig), ("DequantizerOverrides", DequantizerConfig)],
)
def test_what_may_be_changed_is_described_as_it_is_declared(
    group: str, declared: type[Frozen], document: dict[str, Any]
) -> None:
    """With its bounds, and with the default that holds where a preset does not say otherwise."""
    shown = document["components"]["schemas"][group]["properties"]
    written = declared.model_json_schema()
    fields = set(declared.model_fields) - SHAPE_FIELDS
    assert set(shown) - {"preset"} == fields
    for name in fields - {"dequantizer"}:
        wanted = written["properties"][name]
        assert shown[name]["description"].startswith(wanted["description"])
        if wanted.get("default") is not None:
            default = declared.model_fields[name].get_default()
            assert f"which is {default if isinstance(default, str) else ''}" in shown[name]["description"]
        (value,) = [part for part in shown[name]["anyOf"] if part != {"type": "null"}]
        expected = next((part for part in wanted.get("anyOf", ()) if part != {"type": "null"}), wanted)
        assert {key: value[key] for key in BOUNDS & set(value)} == {
            key: expected[key] for key in BOUNDS & set(expected)
        }


def test_the_defaults_of_some_fields_are_in_their_descriptions(document: dict[str, Any]) -> None:
    training = document["components"]["schemas"]["TrainingOverrides"]["properties"]
    for name, default in (("steps", "312500"), ("learning_rate", "0.0003"), ("compile", "true"), ("milestones", "[]")):
        assert f"which is {default} if" in training[name]["description"]
    assert "Default" not in training["memory_gib"]["description"]
