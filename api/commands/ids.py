"""Ids on the command line: one of another kind is refused before anything is sent."""

from collections.abc import Callable
from pathlib import Path

import typer

KINDS = {"job": "job_", "dataset": "ds_", "checkpoint": "ckpt_", "webhook": "wh_", "delivery": "dlv_", "key": "key_"}
"""Kinds of objects, and how their ids begin."""

_COMMANDS = {
    "job": "flowpp jobs show {}",
    "dataset": "flowpp datasets show {}",
    "checkpoint": "flowpp checkpoints show {}",
    "webhook": "flowpp webhooks show {}",
    "delivery": "flowpp webhooks deliveries WEBHOOK",
    "key": "flowpp keys list",
}
_LISTS = {
    "job": "flowpp jobs list",
    "dataset": "flowpp datasets list",
    "checkpoint": "flowpp checkpoints list",
    "webhook": "flowpp webhooks list",
}


def kind_of(text: str) -> str | None:
    """Returns the kind of an id, or None if it begins like no id."""
    return next((kind for kind, prefix in KINDS.items() if text.startswith(prefix)), None)


def check_id(text: str, *kinds: str) -> None:
    """Raises `typer.BadParameter` if `text` is no id of one of these kinds."""
    found = kind_of(text)
    if found in kinds:
        return
    wanted = " or ".join(f"a {kind}'s id ({KINDS[kind]}...)" for kind in kinds)
    if found is not None:
        raise typer.BadParameter(f"{text} is a {found}: `{_COMMANDS[found].format(text)}`. This needs {wanted}.")
    lists = " and ".join(f"`{_LISTS[kind]}`" for kind in kinds)
    local = ""
    if "checkpoint" in kinds and "job" in kinds and Path(text).exists():
        local = " `python -m flowpp` reads files of this machine, without the service."
    raise typer.BadParameter(f"{text!r} is no id. This needs {wanted}; see {lists}.{local}")


def id_of(*kinds: str) -> Callable[[str | None], str | None]:
    """Returns the callback of an option or argument that takes ids of these kinds."""

    def check(text: str | None) -> str | None:
        if text is not None:
            check_id(text, *kinds)
        return text

    return check
