"""`flowpp presets`."""

import typer

from api.client.transport import LOCAL
from api.commands.options import AsJson, Key, Url
from api.commands.output import print_list, service_at

app = typer.Typer(no_args_is_help=True, help="Models with the recipes that train them.")


@app.command("list")
def list_(as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """List presets: name, and what it is. With --json, every value of theirs."""
    with service_at(url, key) as client:
        print_list(
            ("preset", "description"), client.presets.list(), as_json, lambda preset: (preset.id, preset.description)
        )


@app.callback()
def _group() -> None:  # else typer makes a single command the group itself
    pass
