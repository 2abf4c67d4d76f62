"""What is told of what a training process says."""

import json
import logging

import pytest

from worker.child_log import heard, sentence

LINE = {"time": "2026-01-02T03:04:05.678900+00:00", "level": "error", "logger": "flowpp.console", "message": "it ends"}


def said(line: object) -> list[str]:
    return list(heard(line if isinstance(line, bytes) else json.dumps(line).encode()))


def test_lines_for_people_are_told_and_rows_of_metrics_are_not() -> None:
    assert said(b"something to say \n") == ["something to say"]
    assert said(b"  \n") == []
    assert said({"step": 1, "train_bits_per_dim": 7.0}) == []
    assert said({"step": 1, "message": "no log line"}) == []
    assert said(b"{no JSON") == ["{no JSON"]


def test_of_a_log_line_its_message_is_told_and_its_traceback() -> None:
    assert said(LINE) == ["it ends"]
    assert said(LINE | {"exception": "Traceback\n  line"}) == ["it ends", "Traceback", "  line"]
    assert sentence(json.dumps(LINE)) == "it ends"
    assert sentence("as it is") == "as it is"


def test_where_logs_are_json_the_worker_logs_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("flowpp.console", "worker.child_log")]
    for logger in loggers:
        monkeypatch.setattr(logger, "handlers", [handler])
        monkeypatch.setattr(logger, "disabled", False)
        logger.setLevel(logging.INFO)
    said(LINE), said(b"for people")
    assert not records, "the worker's log is as it was"
    monkeypatch.setenv("FLOWPP_LOG_FORMAT", "json")
    said(LINE | {"job_id": "job_1"}), said(b"for people")
    first, second = records
    assert (first.name, first.levelname, first.getMessage()) == ("flowpp.console", "ERROR", "it ends")
    assert first.__dict__["job_id"] == "job_1"
    assert (second.name, second.getMessage()) == ("worker.child_log", "for people")
