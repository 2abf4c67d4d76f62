"""A job on the terminal: a progress bar, or a line every few seconds where nobody can see a bar move."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from api.client import Client, Event, Job
from api.client.files import Report

LINE_SECONDS = 5


@dataclass
class Figures:
    """What a job has told of itself so far."""

    status: str = "queued"
    step: int = 0
    total: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def take(self, event: Event) -> None:
        if event.type == "status":
            self.status = event.data["status"]
        elif event.type == "metrics":
            self.metrics |= {name: value for name, value in event.data.items() if isinstance(value, int | float)}
            if not self.step:
                self.started = time.monotonic()  # what came before was waiting and initialization
            self.step = int(self.metrics.get("step", self.step))

    def __str__(self) -> str:
        known = (
            ("images_per_second", "{:.0f} images/s"),
            ("train_bits_per_dim", "train {:.3f}"),
            ("validation_bits_per_dim", "validation {:.3f} bits/dim"),
        )
        return "  ".join(text.format(self.metrics[name]) for name, text in known if name in self.metrics)

    @property
    def seconds_left(self) -> float | None:
        if not self.step or self.total is None:
            return None
        return (time.monotonic() - self.started) / self.step * (self.total - self.step)


def watch(client: Client, job_id: str, console: Console) -> Job:
    """Follows a job to its end on `console`, and returns it."""
    figures = Figures()
    with (_bar if console.is_terminal else _lines)(console) as show:
        for event in client.jobs.events(job_id):
            figures.take(event)
            if event.type == "warning":
                console.print(f"warning: {event.data.get('message', event.data)}", markup=False)
            elif event.type == "status" and event.data.get("attempt", 0) > 1 and event.data["status"] == "running":
                console.print(event.data.get("message"), markup=False, highlight=False, soft_wrap=True)
            if event.type == "metrics" and figures.total is None:
                progress = client.jobs.get(job_id).progress
                figures.total = progress.total_steps if progress else None
            show(figures)
    return client.jobs.get(job_id)


@contextmanager
def uploading(console: Console, name: str) -> Iterator[Report | None]:
    """A progress function for an upload, which draws a bar; None where nobody can see it."""
    if not console.is_terminal:
        yield None
        return
    with Progress(TextColumn(f"uploading {name}"), BarColumn(), DownloadColumn(), console=console) as progress:
        task = progress.add_task("")
        yield lambda sent, total: progress.update(task, completed=sent, total=total)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[Figures], None]]:
    columns: tuple[Any, ...] = (
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("queued", total=None, figures="")

        def show(figures: Figures) -> None:
            progress.update(
                task, description=figures.status, completed=figures.step, total=figures.total, figures=str(figures)
            )

        yield show


@contextmanager
def _lines(console: Console) -> Iterator[Callable[[Figures], None]]:
    last = ("", 0.0)

    def show(figures: Figures) -> None:
        nonlocal last
        status, shown = last
        if figures.status == status and time.monotonic() - shown < LINE_SECONDS:
            return
        last = figures.status, time.monotonic()
        step = f"  step {figures.step}/{figures.total or '?'}" if figures.step else ""
        left = figures.seconds_left
        eta = "" if left is None else f"  {left:.0f} s left"
        console.print(f"{figures.status}{step}  {figures}{eta}".rstrip(), markup=False, highlight=False, soft_wrap=True)

    yield show
