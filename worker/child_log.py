"""What a training process says, for people or as JSON, as events of its job and as log lines of the worker."""

import json
import logging
from collections.abc import Iterator
from typing import Any

from flowpp import logs

log = logging.getLogger(__name__)

_LOGGED = {"time", "level", "logger", "message"}


def heard(line: bytes) -> Iterator[str]:
    """The lines to be told of one that it wrote; none where that is a row of its metrics.

    Where logs are JSON, it is also written to the worker's own log, for programs that collect that.
    """
    text = line.decode(errors="replace").rstrip()
    if not text:
        return
    said = _parsed(text)
    if said is None:
        if logs.as_json():
            log.info("%s", text)
        yield text
    elif said.keys() >= _LOGGED:
        if logs.as_json():
            logging.getLogger(said["logger"]).handle(logs.record_of(said))
        yield str(said["message"])
        yield from str(said.get("exception", "")).splitlines()


def sentence(text: str) -> str:
    """What a last line says in words."""
    said = _parsed(text)
    return text if said is None else str(said.get("message", text))


def _parsed(text: str) -> dict[str, Any] | None:
    """A JSON object; none where it is a line for people."""
    if not text.startswith("{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
