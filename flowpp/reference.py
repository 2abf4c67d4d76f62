"""Every field of a model and of a recipe, as documents and commands show it: type, bounds, default, description."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowpp.config import SHAPE_FIELDS
from flowpp.overrides import SECTIONS
from flowpp.presets import Preset

_BOUNDS = {"ge": "from {}", "gt": "more than {}", "le": "to {}", "lt": "and less than {}"}
_LENGTHS = {"min_length": "at least {} items", "max_length": "at most {} items"}


@dataclass(frozen=True)
class Described:
    """One field. `name` has its section: `training.batch_size`."""

    name: str
    type: str
    bounds: str
    default: Any
    description: str

    def value_in(self, preset: Preset) -> Any:
        """Returns the value of the field in a preset, as JSON has it; None if the images set it."""
        if self.from_images:
            return None
        found: Any = preset.model_dump(mode="json")
        for name in self.name.split("."):
            found = found[name]
        return found

    @property
    def from_images(self) -> bool:
        """True if the images set the value, and not the user."""
        section, _, field = self.name.rpartition(".")
        return section == "model" and field in SHAPE_FIELDS


def described(section: str) -> Iterator[Described]:
    """Yields the fields of a section, in the order of its class."""
    declared = SECTIONS[section]
    for name, field in declared.model_fields.items():
        if f"{section}.{name}" not in SECTIONS:
            default = declared.model_construct().model_dump(mode="json")[name]
            yield Described(
                f"{section}.{name}", _type(field.annotation), bounds(field), default, field.description or ""
            )


def bounds(field: FieldInfo) -> str:
    """Returns the bounds of a pydantic field in words, or an empty string."""
    found = {name: getattr(each, name) for each in field.metadata for name in _BOUNDS | _LENGTHS if hasattr(each, name)}
    numbers = [_BOUNDS[name].format(_number(found[name])) for name in _BOUNDS if name in found]
    lengths = [_LENGTHS[name].format(found[name]) for name in _LENGTHS if found.get(name) is not None]
    return ", ".join(filter(None, (" ".join(numbers), *lengths)))


def shown(value: Any) -> str:
    """Returns a value as `--set` takes it: a string as it is, anything else as JSON; None is `automatic`."""
    if value is None:
        return "automatic"
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:,}"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_type(each) for each in arguments if each is not NoneType)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is Annotated:
        return _type(arguments[0])
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = ", ".join(f'"{name}": {_type(field.annotation)}' for name, field in annotation.model_fields.items())
        return f"{{{fields}}}"
    return {str: "string", bool: "true or false"}.get(annotation, annotation.__name__)
