"""What commands print: JSON for programs, tables for people, and how a job ended."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from api.client import Client, Job
from api.watch import transfer

FAILURE, BAD_INPUT, UNREACHED, CANCELLED = 1, 2, 3, 4

EXIT_CODES = """Exit codes: 0 done; 1 the job or the service failed; 2 bad input, or the service refused it;
3 the service cannot be reached; 4 the job was cancelled; 130 stopped by Ctrl-C."""

_COLUMNS = 1_000_000  # a narrow terminal wraps lines; ids stay whole

errors = Console(stderr=True, highlight=False)


def service_at(url: str, key: str) -> Client:
    """Its client, which says when it has to wait."""
    return Client(url, key=key, on_wait=_say_wait)


def _say_wait(seconds: float) -> None:
    errors.print(f"the service asks to wait {math.ceil(seconds)} s", markup=False)


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
    """Prints columns, with a heading on a terminal; in a pipe only if `headed`."""
    table = Table(*head, box=None, pad_edge=False, show_header=bool(head) and (headed or sys.stdout.isatty()))
    for row in rows:
        table.add_row(*map(Text, row))
    if table.row_count:
        console = Console(highlight=False, width=_COLUMNS)
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().rstrip("\n").split("\n"):
            typer.echo(line.rstrip(" "))


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
def waiting_for(job: Job) -> Iterator[None]:
    """Says, where a signal ends the wait, that the job goes on."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code > 128:
            errors.print(
                f"\njob {job.id} goes on. Watch it with `flowpp jobs watch {job.id}`, "
                f"end it with `flowpp jobs cancel {job.id}`.",
                markup=False,
                soft_wrap=True,
            )
        raise


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
        fail(f"job {job.id} {job.status}: {job.error.message} ({job.error.code})", FAILURE)
    if job.status != "succeeded":
        fail(f"job {job.id} is {job.status}", FAILURE)


def refuse_filled(directory: Path) -> None:
    """Raises `typer.BadParameter` where files would come to lie among others."""
    if directory.is_dir() and any(directory.iterdir()):
        raise typer.BadParameter(f"{directory} exists; choose another --output")


def download_artifacts(client: Client, job_id: str, names: Sequence[str], directory: Path) -> list[Path]:
    """Each to its name in the directory. A name that leads out of it raises `OSError`."""
    found = []
    for name in names:
        target = directory / name
        if not target.resolve().is_relative_to(directory.resolve()):
            raise OSError(f"the service names an artifact {name!r}, which leads out of {directory}")
        with transfer(errors, name) as report:
            found.append(client.jobs.download(job_id, name, target, report))
    return found
