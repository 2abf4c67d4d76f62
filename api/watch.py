"""A job on the terminal: its curve and a progress bar, or a line every few seconds if there is no terminal."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from api.client import Client, Event, Job, ProblemError, Unreachable
from api.client.files import Report
from api.client.jobs import Absence
from api.curve import draw

LINE_SECONDS = 5
MOST_QUEUE_SECONDS = 2.0
"""Longest pause between two requests for the place in the queue."""
LEAST_COLUMNS, LEAST_LINES = 60, 16
"""Least size of a terminal that gets a curve."""
MOST_CURVE_LINES = 18

TRAIN, VALIDATION = "train_bits_per_dim", "validation_bits_per_dim"


@dataclass
class Figures:
    """The figures of a job so far."""

    status: str = "queued"
    before: int | None = None
    """How many jobs wait before it, while it is queued."""
    step: int = 0
    total: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {TRAIN: [], VALIDATION: []})
    seconds_left: float | None = None
    _begun: tuple[float, int] | None = None  # when and where the attempt told its first step

    def know(self, job: Job) -> None:
        """Takes the progress from the record of the job: likelihood and sampling jobs have no metrics."""
        if job.progress is not None:
            self.total = job.progress.total_steps
            self.step = max(self.step, job.progress.step)

    def take(self, event: Event) -> None:
        if event.type == "status":
            self.status = event.data["status"]
            self._begun = self.seconds_left = None
        elif event.type == "metrics":
            told = {name: float(value) for name, value in event.data.items() if isinstance(value, int | float)}
            self.metrics |= told
            self.step = int(self.metrics.get("step", self.step))
            for name, points in self.curves.items():
                if name in told and math.isfinite(told[name]):
                    points.append((self.step, told[name]))
            self._estimate(event.created_at)

    def _estimate(self, now: float) -> None:
        """By when the steps were done, not by when we heard of it: what is long past comes all at once."""
        if self._begun is None:
            self._begun = now, self.step
            return
        began, first = self._begun
        if self.total is not None and self.step > first:
            self.seconds_left = (now - began) / (self.step - first) * (self.total - self.step)

    @property
    def standing(self) -> str:
        return self.status if self.before is None else f"{self.status}, {self.before} before it"

    @property
    def time_left(self) -> str:
        return f"{timedelta(seconds=round(self.seconds_left))} left" if self.seconds_left else ""

    def said(self, marks: bool = False) -> Text:
        """The newest figures, with the `marks` that they have in the curve."""
        known = (
            (TRAIN, "⠒⠒ ", "cyan", "train {:.3f}"),
            (VALIDATION, "• ", "yellow", "validation {:.3f} bits/dim"),
            ("images_per_second", "", "", "{:.0f} images/s"),
        )
        told = [
            Text.assemble((mark if marks else "", colour), text.format(self.metrics[name]))
            for name, mark, colour, text in known
            if name in self.metrics
        ]
        return Text("  ").join(told)


def watch(client: Client, job_id: str, console: Console) -> Job:
    """Follows a job to its end on `console`, and returns it."""
    figures = Figures()
    seen = console.is_terminal and not console.is_dumb_terminal
    with (_drawn if seen else _lines)(console, figures) as show:
        _queue(client, job_id, figures, show)
        for event in client.jobs.events(job_id):
            if event.type == "metrics" and figures.total is None:
                figures.know(client.jobs.get(job_id))
            figures.take(event)
            if event.type == "warning":
                console.print(f"warning: {event.data.get('message', event.data)}", markup=False, soft_wrap=True)
            elif event.type == "status" and event.data.get("attempt", 0) > 1 and event.data["status"] == "running":
                console.print(event.data.get("message"), markup=False, highlight=False, soft_wrap=True)
            show()
        job = client.jobs.get(job_id)
        figures.know(job)
    return job


def _queue(client: Client, job_id: str, figures: Figures, show: Callable[[], None]) -> None:
    """Returns when the job is no longer queued. Until then shows its place, which events do not have."""
    absence, pause = Absence(), 0.1
    while True:
        try:
            job = client.jobs.get(job_id)
            absence.over()
            if job.status != "queued":
                figures.before = None
                return
            figures.before = job.queue_position
        except (Unreachable, ProblemError) as error:
            absence.bear(error)
        show()
        time.sleep(pause)
        pause = min(MOST_QUEUE_SECONDS, 1.5 * pause)


@contextmanager
def transfer(console: Console, what: str) -> Iterator[Report | None]:
    """Yields a function that draws a bar of bytes sent or received, or None if there is no terminal."""
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Picture:
    """The curve, if the terminal has room for it, and the bar. Each drawing uses the current size."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._bar = Progress(
            TextColumn("{task.description:9}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            expand=True,
        )
        self._task = self._bar.add_task("queued", total=None, left="")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        figures = self._figures
        train, validation = list(figures.curves[TRAIN]), list(figures.curves[VALIDATION])
        width, height = console.size
        room = len(train) > 1 and width >= LEAST_COLUMNS and height >= LEAST_LINES
        if room:
            yield draw(train, validation, width - 1, min(MOST_CURVE_LINES, height - 6))
        yield figures.said(marks=room)
        self._bar.update(
            self._task,
            description=figures.standing,
            completed=figures.step,
            total=figures.total,
            left=figures.time_left,
        )
        yield self._bar


class _Live(Live):
    """Clears the terminal if its size has changed, since earlier drawings may then be anywhere."""

    _drawn_for: tuple[int, int] | None = None

    def refresh(self) -> None:
        size = (self.console.width, self.console.height)
        if self._drawn_for not in (None, size):
            self.console.clear()
        self._drawn_for = size
        super().refresh()


@contextmanager
def _drawn(console: Console, figures: Figures) -> Iterator[Callable[[], None]]:
    with _Live(_Picture(figures), console=console, refresh_per_second=4):
        yield lambda: None  # it is drawn by the clock, however fast events come


@contextmanager
def _lines(console: Console, figures: Figures) -> Iterator[Callable[[], None]]:
    last = ("", 0.0)

    def show() -> None:
        nonlocal last
        status, shown = last
        if figures.standing == status and time.monotonic() - shown < LINE_SECONDS:
            return
        last = figures.standing, time.monotonic()
        step = f"  step {figures.step}/{figures.total or '?'}" if figures.step else ""
        said = f"{figures.standing}{step}  {figures.said()}  {figures.time_left}".rstrip()
        console.print(said, markup=False, highlight=False, soft_wrap=True)

    yield show
