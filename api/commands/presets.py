"""`flowpp presets`."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from api.client.transport import LOCAL
from api.commands.options import AsJson, Key, Url, one_of
from api.commands.output import print_json, print_list, print_table, service_at
from flowpp.overrides import SECTIONS
from flowpp.presets import PRESETS, Preset
from flowpp.reference import Described, described, shown


class _Presets(TyperGroup):
    """A group where `presets small` means `presets show small`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["show", *args]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Presets, no_args_is_help=True, help="Models with the recipes that train them.")


@app.command("list")
def list_(as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """List presets: name and description. With --json, all their values."""
    with service_at(url, key) as client:
        print_list(
            ("preset", "description"), client.presets.list(), as_json, lambda preset: (preset.id, preset.description)
        )


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", autocompletion=lambda: list(PRESETS), callback=one_of(PRESETS))
    ],
    as_json: AsJson = False,
) -> None:
    """Print every field of a preset: value, type and bounds, description. `flowpp presets NAME` does the same.

    The first column is what `flowpp train --set` takes. It needs no service.
    """
    preset = PRESETS[name]
    if as_json:
        fields = [_document(field, preset) for section in SECTIONS for field in described(section)]
        print_json({"id": name, "description": preset.description, "fields": fields})
        return
    typer.echo(f"{name}: {preset.description}")
    for section in SECTIONS:
        typer.echo()
        print_table(("field", "value", "type and bounds", "description"), _rows(section, preset))


def _rows(section: str, preset: Preset) -> Iterator[tuple[str, ...]]:
    for field in described(section):
        value = "from images" if field.from_images else shown(field.value_in(preset))
        yield field.name, value, f"{field.type} {field.bounds}".rstrip(), field.description


def _document(field: Described, preset: Preset) -> dict[str, Any]:
    return {
        "name": field.name,
        "value": field.value_in(preset),
        "default": field.default,
        "type": field.type,
        "bounds": field.bounds,
        "description": field.description,
    }
