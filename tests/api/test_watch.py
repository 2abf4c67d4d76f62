"""A job watched on a terminal, which is a real one: a pty."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from api.client import Client, Event, Job
from api.curve import draw
from api.stack import Stack
from api.watch import Figures
from tests.waiting import PATIENCE_SECONDS, until

BRAILLE = re.compile("[\u2801-\u28ff]")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Terminal:
    """The command in a terminal, and all that it has written there."""

    process: subprocess.Popen[bytes]
    control: int
    written: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        return self.written.decode(errors="replace")

    def lines(self, begin: int = 0) -> list[str]:
        """What was written from `begin` on, without control sequences."""
        return re.split(r"[\r\n]+", CONTROL.sub("", self.text[begin:]))

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.control, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextmanager
def terminal(*arguments: str, columns: int = 100, rows: int = 30, **environment: str) -> Iterator[Terminal]:
    control, side = pty.openpty()
    fcntl.ioctl(control, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    command = [sys.executable, "-c", "from api.cli import main; main()", *arguments]
    own = {**kept, "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=own, start_new_session=True)
    os.close(side)
    seen = Terminal(process, control)

    def read() -> None:
        while True:
            try:
                piece = os.read(control, 65_536)
            except OSError:  # the command has ended
                return
            if not piece:
                return
            seen.written += piece

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        thread.join()
        os.close(control)


def test_tables_have_names_above_their_columns_on_a_terminal(stack: Stack, trained: Job) -> None:
    heads = {
        ("presets", "list"): "preset description",
        ("jobs", "attempts", trained.id): "attempt status began ended worker why",
        ("checkpoints", "list"): "checkpoint step images seen validation created job",
    }
    for command, head in heads.items():
        with terminal(*command, "--url", stack.url) as seen:
            assert seen.process.wait(PATIENCE_SECONDS) == 0
        assert seen.lines()[0].split() == head.split()


def test_a_curve_and_a_bar_are_drawn_and_stay_when_the_job_has_ended(stack: Stack, trained: Job) -> None:
    with terminal("jobs", "watch", trained.id, FLOWPP_URL=stack.url) as seen:
        assert seen.process.wait(PATIENCE_SECONDS) == 0
    last = seen.lines()[-26:]
    assert sum(bool(BRAILLE.search(line)) for line in last) > 4
    assert any("train" in line and "validation" in line and "images/s" in line for line in last)
    assert any(line.startswith("succeeded") and "20/20" in line for line in last)
    assert max(map(len, seen.lines())) <= 100


def test_a_watched_job_resizes_with_its_terminal_and_goes_on_after_ctrl_c(
    stack: Stack, client: Client, trained: Job
) -> None:
    dataset = trained.request["dataset"]
    with terminal("train", dataset, "--preset", "tiny", "--steps", "100000", FLOWPP_URL=stack.url) as seen:
        until(lambda: bool(BRAILLE.search(seen.text)))
        begin = len(seen.text)
        seen.resize(columns=70, rows=10)
        until(lambda: "\x1b[2J" in seen.text[begin:])
        begin += seen.text[begin:].index("\x1b[2J")
        until(lambda: seen.text[begin:].count("running") > 4)
        small = seen.lines(begin)
        assert not any(BRAILLE.search(line.partition("⠒⠒")[0]) for line in small), "there is no room for a curve"
        assert max(map(len, small)) <= 70
        begin = len(seen.text)
        seen.resize(columns=120, rows=40)
        until(lambda: bool(BRAILLE.search(seen.text[begin:])))
        seen.process.send_signal(signal.SIGINT)
        assert seen.process.wait(PATIENCE_SECONDS) == 130
        (job,) = re.findall(r"^job_[0-9a-f]{24}", CONTROL.sub("", seen.text), re.MULTILINE)[:1]
    assert f"Job {job} continues: `flowpp jobs watch {job}` follows it" in " ".join(seen.lines())
    assert client.jobs.get(job).status == "running"
    client.jobs.cancel(job)
    assert client.jobs.wait(job, timeout=PATIENCE_SECONDS).status == "cancelled"


def test_a_job_without_steps_shows_how_many_images_are_done(stack: Stack, client: Client, trained: Job) -> None:
    job = client.sampling_jobs.create(model=trained.id, num_samples=4, wait=30)
    with terminal("jobs", "watch", job.id, FLOWPP_URL=stack.url) as seen:
        assert seen.process.wait(PATIENCE_SECONDS) == 0
    assert any(line.startswith("succeeded") and "4/4" in line for line in seen.lines()[-4:])


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "columns": "59"}])
def test_there_is_no_curve_where_it_cannot_be_seen(environment: dict[str, str], stack: Stack, trained: Job) -> None:
    columns = int(environment.pop("columns", 100))
    with terminal("jobs", "watch", trained.id, columns=columns, FLOWPP_URL=stack.url, **environment) as seen:
        assert seen.process.wait(PATIENCE_SECONDS) == 0
    assert not BRAILLE.search(seen.text)
    assert "20/20" in seen.text


def test_the_time_left_is_told_by_when_steps_were_done_not_by_when_they_were_heard_of() -> None:
    figures = Figures(total=100)
    for event in told(status=[(0, "queued"), (50, "running")], steps=[(60, 1), (70, 11), (80, 21)]):
        figures.take(event)
    assert figures.seconds_left == pytest.approx(79), "a second a step"


def test_a_job_that_was_paused_is_not_slower_for_it() -> None:
    figures = Figures(total=100)
    pause = [(80, "paused"), (5000, "running")]
    for event in told(status=[(50, "running"), *pause], steps=[(60, 1), (70, 11), (5010, 21), (5030, 41)]):
        figures.take(event)
    assert figures.seconds_left == pytest.approx(59)


def told(status: list[tuple[float, str]], steps: list[tuple[float, int]]) -> list[Event]:
    """Events, each with when it came, in that order."""
    found = [(at, "status", {"status": what}) for at, what in status]
    found += [(at, "metrics", {"step": step}) for at, step in steps]  # type: ignore[misc]
    return [
        Event(id=f"{index}-0", type=kind, created_at=at, data=data)
        for index, (at, kind, data) in enumerate(sorted(found, key=lambda each: each[0]))
    ]


@pytest.mark.parametrize("points", [1, 2, 1000])
@pytest.mark.parametrize("value", [0.0, 3.2, 1e9])
def test_a_curve_keeps_to_its_room_whatever_its_values(points: int, value: float) -> None:
    train = [(step, value + step % 7) for step in range(1, points + 1)]
    for validation in ([], [(1, value)], [(points, 2 * value)]):
        lines = draw(train, validation, 80, 12).plain.split("\n")
        assert len(lines) <= 12
        assert max(map(len, lines)) <= 80
