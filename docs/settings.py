"""Writes docs/settings.md from flowpp.reference import bounds
from worker.settings: `make docs`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from flowpp.reference import bounds
from worker.settings import Settings

LIST = Path(__file__).with_name("settings.md")

INTRODUCTION = """# Settings

Environment variables of the API and of the workers; all of them read the same, and a value out of bounds stops them
with a sentence that names it. `docs/operations.md` says what to think of. Traces have OpenTelemetry's own variables,
`OTEL_...`, which `docs/observability.md` lists. `FLOWPP_KERNELS`, a setting of the library, restricts the CPU kernels
of workers: `docs/performance.md` describes it.

| variable | default | bounds | is |
|---|---|---|---|
"""


def as_markdown() -> str:
    """One row a setting, in the order of the class."""
    return INTRODUCTION + "".join(f"| {' | '.join(_row(name, field))} |\n" for name, field in _fields())


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    yield from Settings.model_fields.items()


def _row(name: str, field: FieldInfo) -> list[str]:
    prefix = Settings.model_config["env_prefix"]
    return [f"`{prefix}{name.upper()}`", _default(field), bounds(field), field.description or ""]


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "by the machine"
    value = field.default
    if value is None or value == "" or value == ():
        return ""
    return f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    """As one writes it into the environment."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def main() -> None:
    LIST.write_text(as_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
