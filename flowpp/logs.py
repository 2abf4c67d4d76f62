"""Log lines as JSON objects, one a line, for programs that collect them: where FLOWPP_LOG_FORMAT is json.

Each has `time` (UTC), `level`, `logger` and `message`; where they apply, `request_id`, `job_id`, `attempt` and
`trace_id`, and the traceback as `exception`.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

FORMAT = "FLOWPP_LOG_FORMAT"

CONTEXT = {
    "request_id": "FLOWPP_REQUEST_ID",
    "job_id": "FLOWPP_JOB_ID",
    "attempt": "FLOWPP_ATTEMPT",
    "trace_id": "FLOWPP_TRACE_ID",
}
"""What a line may be about, and the variables by which a process is told what all of its lines are about."""

_about: ContextVar[dict[str, str | int]] = ContextVar("about")


def as_json() -> bool:
    """Whether lines are JSON; else they are for people."""
    return os.environ.get(FORMAT) == "json"


def subject() -> dict[str, str | int]:
    """What the lines of here and now are about."""
    return _about.get({})


@contextmanager
def about(**what: str | int) -> Iterator[None]:
    """Lines that are written within the block are about this: names of `CONTEXT`; what is empty says nothing."""
    token = _about.set(subject() | {name: value for name, value in what.items() if value})
    try:
        yield
    finally:
        _about.reset(token)


def variables(**what: str | int) -> dict[str, str]:
    """The environment of a process all of whose lines are about this."""
    return {CONTEXT[name]: str(value) for name, value in what.items() if value}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON. `clean` removes from it what must not be told."""

    def __init__(self, clean: Callable[[str], str] = str) -> None:
        super().__init__()
        self._clean = clean
        told = {name: os.environ[variable] for name, variable in CONTEXT.items() if variable in os.environ}
        self._process = {name: int(value) if name == "attempt" else value for name, value in told.items()}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            **subject(),
            **{name: value for name in CONTEXT if (value := getattr(record, name, None))},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:
            line["exception"] = record.exc_text
        return self._clean(json.dumps(line, default=str))


def install(clean: Callable[[str], str] = str) -> None:
    """All that this process logs or warns of, and what ends it or a thread of it, is written to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(clean))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _log_end
    threading.excepthook = lambda end: _log_end(end.exc_type, end.exc_value, end.exc_traceback)


def _log_end(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, SystemExit):
        logging.getLogger("flowpp").critical("%s: %s", kind.__name__, error, exc_info=(kind, error, traceback))


def record_of(line: dict[str, Any]) -> logging.LogRecord:
    """The record that such a line was made of, as far as it tells."""
    level = logging.getLevelNamesMapping().get(str(line["level"]).upper(), logging.INFO)
    record = logging.LogRecord(str(line["logger"]), level, "", 0, str(line["message"]), None, None)
    record.created = datetime.fromisoformat(line["time"]).timestamp()
    record.__dict__.update({name: line[name] for name in CONTEXT if name in line})
    record.exc_text = line.get("exception")
    return record
