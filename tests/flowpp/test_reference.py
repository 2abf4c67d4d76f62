"""The reference of fields: complete, and what `flowpp presets NAME` and docs/configuration.md print of it."""

import json

import pytest

from docs import configuration
from flowpp.config import SHAPE_FIELDS
from flowpp.overrides import SECTIONS, parse_overrides
from flowpp.presets import PRESETS, resolve_model, resolve_training
from flowpp.reference import described, shown
from tests.api.test_cli import flowpp

FIELDS = [field for section in SECTIONS for field in described(section)]


def test_every_field_has_a_type_and_a_description_and_a_row_in_the_document() -> None:
    document = configuration.as_markdown()
    for section, declared in SECTIONS.items():
        names = [field.name for field in FIELDS if field.name.rpartition(".")[0] == section]
        assert names == [f"{section}.{name}" for name in declared.model_fields if f"{section}.{name}" not in SECTIONS]
    for field in FIELDS:
        assert field.type
        assert field.description.endswith(".")
        assert f"| `{field.name}` | " in document


def test_bounds_are_in_words() -> None:
    bounds = {field.name: field.bounds for field in FIELDS}
    assert bounds["model.dropout"] == "from 0 and less than 1"
    assert bounds["training.learning_rate"] == "more than 0 to 1"
    assert bounds["model.flow"] == "at least 1 items, at most 16 items"
    assert bounds["training.gradient_clip"] == "more than 0 to 1,000,000,000"
    assert bounds["training.compile"] == ""


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_prints_is_what_set_takes(name: str) -> None:
    """Setting each field to its printed value gives the preset again."""
    preset = PRESETS[name]
    texts = [
        f"{field.name}={shown(field.value_in(preset))}"
        for field in FIELDS
        if not field.from_images and field.value_in(preset) is not None
    ]
    model, training = parse_overrides(texts)
    assert resolve_model("tiny", model, preset.model.image_shape) == preset.model
    assert resolve_training("tiny", training) == preset.training


def test_a_preset_is_printed_with_every_field_and_needs_no_service() -> None:
    shown_fields = flowpp("presets", "small", FLOWPP_URL="http://127.0.0.1:1")
    assert shown_fields.returncode == 0, shown_fields.stderr
    lines = shown_fields.stdout.splitlines()
    assert lines[0] == f"small: {PRESETS['small'].description}"
    rows = {line.split()[0]: line for line in lines[1:] if line}
    assert rows.keys() == {field.name for field in FIELDS}
    assert all(field.description in rows[field.name] for field in FIELDS)
    assert rows["training.batch_size"].split()[1:6] == ["32", "int", "from", "1", "to"]
    assert shown_fields.stdout == flowpp("presets", "show", "small").stdout
    document = json.loads(flowpp("presets", "small", "--json").stdout)
    values = {field["name"]: field["value"] for field in document["fields"]}
    assert values["training.batch_size"] == 32
    assert values["model.flow"][0] == "squeeze"
    assert all(values[f"model.{name}"] is None for name in SHAPE_FIELDS)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    refused = flowpp("presets", "smal")
    assert (refused.returncode, "did you mean small?" in refused.stderr) == (2, True)
    assert "presets NAME" in flowpp("train", "--help", COLUMNS="200").stdout
