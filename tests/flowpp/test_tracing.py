"""Traces: nothing where they are not configured, a sentence where they cannot be sent, and never a wait for them."""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowpp import logs, tracing
from tests.collector import ENDPOINT, Collector, collecting
from tests.waiting import PATIENCE_SECONDS

ON = {ENDPOINT: "http://127.0.0.1:9"}  # where nobody listens


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)


SPANS = "import sys, flowpp.tracing as tracing\nwith tracing.sending('x'), tracing.span('y') as span: pass\n"


@pytest.mark.parametrize("environment", [{}, {ENDPOINT: ""}, ON | {"OTEL_SDK_DISABLED": "true"}])
def test_without_an_endpoint_nothing_is_imported_and_a_span_is_nothing(environment: dict[str, str]) -> None:
    code = SPANS + "import flowpp.__main__\n"
    code += "assert span is tracing.NOTHING\nprint([name for name in sys.modules if 'opentelemetry' in name])"
    assert run(code, **environment).stdout == "[]\n"


def test_without_an_endpoint_training_process_workers_and_api_load_no_tracing() -> None:
    code = "import sys\ndef loaded(*names): print([name for name in sys.modules if name.startswith(names)])\n"
    code += "import flowpp.__main__, flowpp.recording, flowpp.training\nloaded('opentelemetry')\n"
    code += "import api.app, worker.__main__, worker.inference, worker.training\n"
    code += "loaded('opentelemetry.sdk.trace', 'opentelemetry.exporter')"  # redis itself loads that of metrics
    ended = run(code)
    assert (ended.stdout, ended.stderr) == ("[]\n[]\n", "")


MISSING = "import sys\nsys.modules['opentelemetry.sdk'] = None\n"
COMMANDS = {
    "worker": "from worker.__main__ import main\nsys.argv = ['worker', 'training']\nsys.exit(main())",
    "flowpp": "from api.cli import main\nsys.argv = ['flowpp', 'serve', '--data', DATA]\nmain()",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_process_that_cannot_send_traces_says_what_to_install(name: str, tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    ended = run(f"{MISSING}DATA = {data!r}\n{COMMANDS[name]}", **ON)
    assert ended.returncode == 2
    [said] = ended.stderr.splitlines()
    assert said.startswith(f"{name}: {ENDPOINT} is set")
    assert "pip install -e '.[tracing]'" in said
    assert not Path(data).exists()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({ENDPOINT: "collector:4318"}, f"{ENDPOINT} is no URL"),
        (ON | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is grpc"),
        (ON | {"OTEL_BSP_MAX_QUEUE_SIZE": "1"}, r"do not fit: max_export_batch_size"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(tracing.TracingError, match=reason), tracing.sending("x"):
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting(monkeypatch) as collector:
        yield collector


def test_inner_spans_belong_to_the_outer_and_the_outer_to_the_parent_that_is_named(collector: Collector) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with tracing.sending("mine"):
        with tracing.span("outer", parent=parent), tracing.span("inner", attributes={"n": 3}):
            pass
        with tracing.span("apart", parent="no traceparent", links=[parent]):
            pass
    outer, inner, apart = (collector.one(name) for name in ("outer", "inner", "apart"))
    assert (outer.trace, outer.parent) == tuple(parent.split("-")[1:3])
    assert (inner.trace, inner.parent, inner.attributes) == (outer.trace, outer.id, {"n": 3})
    assert (apart.parent, apart.links) == ("", [outer.parent])
    assert {span.service for span in collector.spans} == {"mine"}


def test_the_service_is_called_as_the_environment_says(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "theirs")
    with tracing.sending("mine"), tracing.span("a"):
        pass
    assert collector.one("a").service == "theirs"


def test_an_exception_makes_its_span_fail_and_its_message_is_not_told(collector: Collector) -> None:
    with tracing.sending("x"), pytest.raises(ValueError, match="s3cret"), tracing.span("a"):
        raise ValueError("s3cret")
    assert collector.one("a").failed
    assert b"s3cret" not in b"".join(collector.received)


def test_log_lines_within_a_span_name_its_trace(collector: Collector) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "said", None, None)
    with tracing.sending("x"), tracing.span("a"):
        line = json.loads(logs.JsonFormatter().format(record))
    assert line["trace_id"] == collector.one("a").trace


@pytest.mark.parametrize("silent", [False, True], ids=["nobody listens", "nobody answers"])
def test_without_a_collector_a_process_ends_two_seconds_later_and_warns_once(silent: bool) -> None:
    code = (
        "import time, flowpp.tracing as tracing\n"
        "with tracing.sending('x'):\n"
        "    began = time.monotonic()\n"
        "    for _ in range(5000):\n"
        "        with tracing.span('y'): pass\n"
        "    ended = time.monotonic()\n"
        "print(ended - began, time.monotonic() - ended)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not silent:
            server.close()
        settings = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": str(PATIENCE_SECONDS)}
        ended = run(code, **settings | {ENDPOINT: f"http://127.0.0.1:{port}/?key=s3cret"})
    spans, end = map(float, ended.stdout.split())
    assert spans < PATIENCE_SECONDS / 2, "it has waited for the collector"
    assert end < PATIENCE_SECONDS / 2, "it has waited for the collector"
    assert ended.stderr.count("traces are not sent") == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "s3cret" not in ended.stderr


SPAN_IN_SECONDS = "import time, flowpp.tracing as tracing\nwith tracing.sending('x'):\n"
SPAN_IN_SECONDS += "    with tracing.span('y'): pass\n    time.sleep(SECONDS)\n"


def test_of_what_is_sent_at_the_second_try_nothing_is_said(collector: Collector) -> None:
    collector.refusals = 1
    code = SPAN_IN_SECONDS.replace("SECONDS", "4")
    assert run(code, **{ENDPOINT: collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}).stderr == ""
    assert collector.one("y")


def test_of_what_is_dropped_after_several_tries_is_said_why(collector: Collector) -> None:
    collector.refusals = 100
    environment = {ENDPOINT: collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": "3"}
    [said] = run(SPAN_IN_SECONDS.replace("SECONDS", "5"), **environment).stderr.splitlines()
    assert "traces are not sent, and are dropped meanwhile: Failed to export" in said
    assert "Service Unavailable" in said


def test_headers_that_cannot_be_read_are_not_told() -> None:
    ended = run(
        "import flowpp.tracing as tracing\nwith tracing.sending('x'): pass", **ON, OTEL_EXPORTER_OTLP_HEADERS="s3cret"
    )
    assert ended.stderr == "OTEL_EXPORTER_OTLP_HEADERS is no list of name=value, with commas between\n"
