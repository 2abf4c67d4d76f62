"""What the command line shows and catches: progress bars, JSON lines, signals, and errors in one sentence."""

import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowpp.logs import as_json

if TYPE_CHECKING:
    from flowpp.training import Event

log = logging.getLogger(__name__)

_TIMES = (TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"))


class _Terminal(Console):
    """A console that drops its output if its pipe is closed; rich's own would end the command."""

    def on_broken_pipe(self) -> None:
        drop_closed_streams()


errors = _Terminal(stderr=True, highlight=False, markup=False, soft_wrap=True)


def drop_closed_streams() -> None:
    """Leads standard output and error to nowhere if nobody reads them any more, as after `| head`."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def show(line: str) -> None:
    """Prints a line of a result on stdout, at once; dropped if the disk is full or nobody reads it."""
    with unless_it_cannot_be_shown():
        print(line, flush=True)


def say(sentence: str, level: int = logging.INFO) -> None:
    """On stderr: as it is, or as a log line where these are JSON."""
    if as_json():
        log.log(level, "%s", sentence)
    else:
        with unless_it_cannot_be_shown():
            errors.print(sentence)


class BadInput(ValueError):
    """An argument that cannot be right; the message is a sentence."""


class Stop(threading.Event):
    """That a process is to end, and whether somebody at its terminal said so."""

    interrupted = False


@contextmanager
def stopping_on_signals() -> Iterator[Stop]:
    """An event that SIGINT and SIGTERM set. A second SIGINT raises `KeyboardInterrupt`."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.interrupted = number == signal.SIGINT
        stop.set()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def show_training(events: Iterable["Event"], steps: int, as_json: bool) -> Iterator["Event"]:
    """Passes the events on, and shows them as a bar, or as JSON lines where no one watches."""
    if as_json or not sys.stdout.isatty():
        for event in events:
            _print_event(event)
            if event.note:
                say(event.note)
            yield event
        return
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[numbers]}"),
        *_TIMES,
    )
    latest: dict[str, float] = {}
    with Progress(*columns, console=_Terminal(highlight=False)) as progress:
        task = None
        for event in events:
            if task is None:  # a resumed run begins further on; the estimate must not take that for speed
                task = progress.add_task("", total=steps, completed=event.step - 1, numbers="")
            if event.note:
                say(event.note)
            latest |= event.metrics
            progress.update(task, completed=event.step, numbers=_numbers(latest))
            yield event


@contextmanager
def unless_it_cannot_be_shown() -> Iterator[None]:
    """Drops what the block prints if a full disk or a closed pipe refuses it: that must not end a run."""
    try:
        yield
    except BrokenPipeError:
        drop_closed_streams()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def files_in(output: Path) -> list[str]:
    """Returns a file's path, or those of a directory's files; a directory inside it counts its files."""
    if output.is_file():
        return [str(output)]
    return [
        f"{path}/ ({sum(1 for _ in path.iterdir()):,} files)" if path.is_dir() else str(path)
        for path in sorted(output.iterdir(), key=lambda path: (path.is_dir(), path.name))
    ]


def track(batches: Iterable[np.ndarray], total: int, what: str) -> np.ndarray:
    """All batches as one array, with a bar on stderr of `total` rows meanwhile."""
    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), *_TIMES)
    parts = []
    with Progress(*columns, console=errors, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        for batch in batches:
            parts.append(batch)
            progress.advance(task, len(batch))
    return np.concatenate(parts)


def _print_event(event: "Event") -> None:
    if event.metrics or event.checkpoint:
        row: dict[str, Any] = {"step": event.step, "images_seen": event.images_seen, **event.metrics}
        if event.checkpoint:
            row["checkpoint"] = event.checkpoint.name
        show(json.dumps(row))


def _numbers(metrics: dict[str, float]) -> str:
    shown = {
        "images_per_second": "{:.0f} images/s",
        "train_bits_per_dim": "train {:.3f}",
        "validation_bits_per_dim": "validation {:.3f} bits/dim",
    }
    return "  ".join(form.format(metrics[name]) for name, form in shown.items() if name in metrics)
