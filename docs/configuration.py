"""Writes docs/configuration.md from flowpp.config and flowpp.presets: `make docs`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from flowpp.overrides import SECTIONS
from flowpp.presets import PRESETS, Preset
from flowpp.reference import Described, described, shown

LIST = Path(__file__).with_name("configuration.md")

INTRODUCTION = """# Configuration

Every field of a model and of its recipe. A preset sets all of them, and each can be changed:

- on the command line: `flowpp train ... --preset small --set training.batch_size=64`, and the same with
  `python -m flowpp train`. A value is JSON or a bare word: `--set 'model.flow=["squeeze", "channels x2"]'`.
- over HTTP: `{"model": {"preset": "small", "filters": 48, "dequantizer": {"blocks": 1}}, "training": {"steps": 500}}`.
- in Python: `flowpp.ModelConfig(filters=48)` and `flowpp.TrainingConfig(steps=500)`, with the defaults below.

`flowpp presets NAME` prints these tables with the values of one preset. [training.md](training.md) explains how the
recipe works, and [model.md](model.md) explains the model.
"""

_TITLES = {"model": "Model", "model.dequantizer": "Dequantizer", "training": "Recipe"}


def as_markdown() -> str:
    """Returns a table of fields for each section, and for each preset a table of what differs from the defaults."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield INTRODUCTION
    for section in SECTIONS:
        yield f"## {_TITLES[section]}\n"
        yield from _table(("field", "type", "bounds", "default", "description"), map(_row, described(section)))
    yield "## Presets\n\nHeight, width and channels come from the images. A field that is not listed has its default.\n"
    for name, preset in PRESETS.items():
        yield f"### {name}\n\n{preset.description}\n"
        yield from _table(("field", "value", "default"), _differences(preset))


def _row(field: Described) -> tuple[str, ...]:
    default = "the images'" if field.from_images else _code(shown(field.default))
    return _code(field.name), _plain(field.type), field.bounds, default, field.description


def _differences(preset: Preset) -> Iterator[tuple[str, ...]]:
    for section in SECTIONS:
        for field in described(section):
            value = field.value_in(preset)
            if not field.from_images and value != field.default:
                yield _code(field.name), _code(shown(value)), _code(shown(field.default))


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    found = [*rows]
    if found:
        yield f"| {' | '.join(head)} |\n{'|---' * len(head)}|"
        yield from (f"| {' | '.join(row)} |" for row in found)
        yield ""
    else:
        yield "All fields have their defaults.\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _plain(text: str) -> str:
    return f"`{text}`" if text.startswith(("{", "list of {")) else text


def main() -> None:
    LIST.write_text(as_markdown())


if __name__ == "__main__":
    main()
