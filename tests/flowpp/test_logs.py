"""Log lines as JSON: what each tells, and what ends a process is a line, too."""

import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

from flowpp.logs import JsonFormatter, about, record_of, variables

LOGGER = logging.getLogger("flowpp.test")


def line(formatter: JsonFormatter | None = None, **extra: Any) -> dict[str, Any]:
    record = LOGGER.makeRecord(LOGGER.name, logging.WARNING, "", 0, "%d of %s", (3, "four\nlines"), None, extra=extra)
    text = (formatter or JsonFormatter()).format(record)
    assert "\n" not in text
    return dict(json.loads(text))


def test_a_line_tells_time_level_logger_and_message() -> None:
    told = line()
    assert told.pop("time").endswith("+00:00")
    assert told == {"level": "warning", "logger": "flowpp.test", "message": "3 of four\nlines"}


def test_a_line_tells_what_it_is_about_and_the_inner_block_counts() -> None:
    with about(request_id="r", job_id="outer"), about(job_id="inner", attempt=2):
        told = line()
    assert (told["request_id"], told["job_id"], told["attempt"]) == ("r", "inner", 2)
    assert line(job_id="extra")["job_id"] == "extra"
    assert "job_id" not in line(job_id="")
    assert "request_id" not in line()


def test_a_process_that_is_told_by_its_environment_says_so_in_each_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(request_id="r", job_id="j", attempt=3).items():
        monkeypatch.setenv(name, value)
    told = line(JsonFormatter())
    assert (told["request_id"], told["job_id"], told["attempt"]) == ("r", "j", 3)


def test_what_must_not_be_told_is_cleaned_also_of_tracebacks() -> None:
    formatter = JsonFormatter(lambda text: text.replace("secret", "..."))
    try:
        raise ValueError("the secret")
    except ValueError:
        record = LOGGER.makeRecord(LOGGER.name, logging.ERROR, "", 0, "a secret", (), sys.exc_info())
    told = json.loads(formatter.format(record))
    assert told["message"] == "a ..."
    assert told["exception"].endswith("ValueError: the ...")


def test_a_line_that_is_passed_on_stays_what_it_was() -> None:
    with about(job_id="j", attempt=1):
        told = line()
    again = json.loads(JsonFormatter().format(record_of(told | {"exception": "Traceback"})))
    assert again == told | {"exception": "Traceback"}


def test_warnings_and_what_ends_a_process_are_lines(tmp_path: object) -> None:
    code = "import warnings, flowpp.logs as logs; logs.install(); warnings.warn('beware'); 1 / 0"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    warned, died = map(json.loads, ended.stderr.splitlines())
    assert ended.returncode == 1
    assert (warned["logger"], warned["level"]) == ("py.warnings", "warning")
    assert (died["level"], died["message"]) == ("critical", "ZeroDivisionError: division by zero")
    assert died["exception"].startswith("Traceback")
