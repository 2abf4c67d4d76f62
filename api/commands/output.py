"""Output of commands: JSON for programs, tables for people, and the end of a job."""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.client import Client, Job, ProblemError
from api.client.files import Report
from api.commands.refusals import in_words, translated
from api.watch import transfer

FAILURE, BAD_INPUT, UNREACHED, CANCELLED = 1, 2, 3, 4

EXIT_CODES = """Exit codes: 0 done; 1 the job or the service failed; 2 bad input, or the service refused it;
3 the service cannot be reached; 4 the job was cancelled; 130 stopped by Ctrl-C."""

_COLUMNS = 1_000_000  # a narrow terminal wraps lines; ids stay whole

errors = Console(stderr=True, highlight=False)


@contextmanager
def service_at(url: str, key: str, max_retries: int = 3) -> Iterator[Client]:
    """Yields a client of the service at `url`; a refusal of the service ends the command with a sentence."""
    with Client(url, key=key, max_retries=max_retries, on_wait=_say_wait) as client:
        try:
            yield client
        except ProblemError as error:
            ours = error.status >= 500 or error.status == 429
            fail(in_words(error, client.url, key), FAILURE if ours else BAD_INPUT)


def note(sentence: str) -> None:
    """Prints a sentence on stderr, in one line, so that ids and commands in it can be copied."""
    errors.print(sentence, markup=False, soft_wrap=True)


def _say_wait(seconds: float) -> None:
    note(f"the service is busy; the next try is in {math.ceil(seconds)} s")


def fail(message: str, status: int) -> NoReturn:
    print(f"flowpp: {message}", file=sys.stderr)
    raise SystemExit(status)


def print_json(document: BaseModel | dict[str, Any]) -> None:
    """On one line."""
    text = document.model_dump_json() if isinstance(document, BaseModel) else json.dumps(document)
    typer.echo(text)


def print_object(found: BaseModel, as_json: bool) -> None:
    """All its fields: JSON, or a line each."""
    if as_json:
        print_json(found)
        return
    print_table((), [(name, _said(name, value)) for name, value in found.model_dump(mode="json").items()])


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, headed: bool = False) -> None:
    """Prints columns, with a heading on a terminal; in a pipe only if `headed`.

    Characters that would break a line or control a terminal are escaped: names of files and metadata may have any.
    """
    table = Table(*head, box=None, pad_edge=False, show_header=bool(head) and (headed or sys.stdout.isatty()))
    for row in rows:
        table.add_row(*(Text(_printable(cell)) for cell in row))
    if table.row_count:
        console = Console(highlight=False, width=_COLUMNS)
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().rstrip("\n").split("\n"):
            typer.echo(line.rstrip(" "))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_list(head: Sequence[str], objects: Iterable[BaseModel], as_json: bool, row: Any) -> None:
    """A JSON document a line, or a table of `row(object)`."""
    if as_json:
        for each in objects:
            print_json(each)
    else:
        print_table(head, map(row, objects))


def when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _said(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_at") and isinstance(value, int | float):
        return when(value)
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def on_interrupt(outcome: Callable[[], str]) -> Iterator[None]:
    """Prints `outcome()`, a sentence, if a signal such as Ctrl-C ends the block."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code > 128:
            note(outcome() if not errors.is_terminal else f"\n{outcome()}")
        raise


def waiting_for(job: Job) -> AbstractContextManager[None]:
    """Prints that the job continues if a signal ends the wait for it."""
    return on_interrupt(
        lambda: (
            f"Job {job.id} continues: `flowpp jobs watch {job.id}` follows it, `flowpp jobs cancel {job.id}` ends it."
        )
    )


def creating(kind: str, extra: str = "") -> AbstractContextManager[None]:
    """Prints where to find the job if a signal ends the request that creates it."""
    listing = f"`flowpp jobs list --type {kind} --limit 1` shows it if it was created."
    return on_interrupt(lambda: f"Interrupted while the service created the job: {listing}{extra}")


class UploadProgress:
    """How much of an upload was sent; `kind` is the kind of object that it becomes."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._sent = self._total = 0

    def reporting(self, report: Report | None) -> Report:
        """Returns a function that notes the bytes, and passes them to `report`."""

        def count(sent: int, total: int) -> None:
            self._sent, self._total = sent, total
            if report is not None:
                report(sent, total)

        return count

    def outcome(self) -> str:
        """Returns what became of an interrupted upload."""
        if self._total and self._sent >= self._total:
            command = f"flowpp {self._kind}s list --limit 1"
            sentence = f"`{command}` shows the {self._kind} if it was stored."
            return f"Upload interrupted after all {self._total:,} bytes were sent. {sentence} No job waits."
        sent = f"{self._sent:,} of {self._total:,} bytes were sent" if self._total else "nothing was sent"
        return f"Upload interrupted: {sent}. The service has stored nothing, and no job waits."


def finished(client: Client, job: Job) -> Job:
    """The job when it has ended, however that is."""
    with waiting_for(job), errors.status(f"waiting for {job.id}") if errors.is_terminal else nullcontext():
        return client.jobs.wait(job.id)


def leave_unless_succeeded(job: Job) -> None:
    """With the exit code of how it ended."""
    if job.status == "cancelled":
        why = f": {job.error.message}" if job.error else ""
        fail(f"job {job.id} is cancelled{why}", CANCELLED)
    if job.error is not None:
        fail(f"job {job.id} {job.status}: {translated(job.error.message)} ({job.error.code})", FAILURE)
    if job.status != "succeeded":
        fail(f"job {job.id} is {job.status}", FAILURE)


def refuse_filled(directory: Path) -> None:
    """Raises `typer.BadParameter` where files would come to lie among others."""
    if directory.is_dir() and any(directory.iterdir()):
        raise typer.BadParameter(f"{directory} exists; choose another --output")


def download_artifacts(client: Client, job_id: str, names: Sequence[str], directory: Path) -> list[Path]:
    """Each to its name in the directory. A name that leads out of it raises `OSError`."""
    found: list[Path] = []
    for name in names:
        target = directory / name
        if not target.resolve().is_relative_to(directory.resolve()):
            raise OSError(f"the service names an artifact {name!r}, which leads out of {directory}")
        with (
            on_interrupt(partial(_downloaded, job_id, directory, len(found), len(names))),
            transfer(errors, name) as report,
        ):
            found.append(client.jobs.download(job_id, name, target, report))
    return found


def _downloaded(job_id: str, directory: Path, done: int, total: int) -> str:
    again = f"`flowpp jobs download {job_id} --output {shlex.quote(str(directory))}`"
    return f"{done} of {total} files are in {directory}. Job {job_id} keeps them all; {again} continues."
