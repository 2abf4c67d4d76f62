"""Changes to a preset as users write them on a command line: `model.filters=48`, `training.steps=500`."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from flowpp.config import SHAPE_FIELDS, DequantizerConfig, ModelConfig, TrainingConfig
from flowpp.names import meant

SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "model.dequantizer": DequantizerConfig,
    "training": TrainingConfig,
}
"""The sections of a configuration, by the prefix of their fields."""

_FORMS = "write model.NAME=VALUE, model.dequantizer.NAME=VALUE or training.NAME=VALUE"


def parse_overrides(texts: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the changes of the model and of the recipe; those of the dequantizer are nested in the model's.

    A value is JSON, or else a string. The last of several values of a field counts. Raises `ValueError` if a text
    has another form, or names an unknown field.
    """
    parsed: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for text in texts:
        path, equals, value = text.partition("=")
        section, _, field = path.rpartition(".")
        if not equals or not field:
            raise ValueError(f"--set {text}: {_FORMS}")
        if section not in SECTIONS:
            raise ValueError(f"--set {text}: {_forms(field)}")
        found = _value(value)
        if path == "model.dequantizer":
            if not isinstance(found, dict):
                raise ValueError(f"--set {text}: write model.dequantizer.NAME=VALUE, or a JSON object")
            section, changes = path, found
        else:
            changes = {field: found}
        for name in changes:
            _check_field(text, section, name)
        parsed[section] |= changes
    if parsed["model.dequantizer"]:
        parsed["model"]["dequantizer"] = parsed["model.dequantizer"]
    return parsed["model"], parsed["training"]


def _check_field(text: str, section: str, field: str) -> None:
    if section == "model" and field in SHAPE_FIELDS:
        raise ValueError(f"--set {text}: {field} comes from the images and cannot be set")
    known = [name for name in SECTIONS[section].model_fields if name not in {*SHAPE_FIELDS, "dequantizer"}]
    if field not in known:
        elsewhere = [f"{each}.{field}" for each in _sections_of(field)]
        hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else meant(field, known)
        raise ValueError(f"--set {text}: {section} has no field {field!r}; {hint}")


def _forms(field: str) -> str:
    """Returns how to write a field whose section is missing."""
    found = [f"{section}.{field}" for section in _sections_of(field)]
    return f"did you mean {' or '.join(found)}?" if found else _FORMS


def _sections_of(field: str) -> Iterator[str]:
    return (section for section, declared in SECTIONS.items() if field in declared.model_fields)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # a bare word
