"""`flowpp jobs`."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from api.client import Job
from api.client.transport import LOCAL
from api.commands.options import STATUSES, TYPES, AsJson, JobId, Key, Limit, Metadata, Url, one_of, pairs
from api.commands.output import (
    download_artifacts,
    leave_unless_succeeded,
    print_json,
    print_list,
    print_object,
    service_at,
    when,
)
from api.commands.training import follow
from flowpp.names import meant

app = typer.Typer(no_args_is_help=True, help="Jobs of every kind.")


@app.command("list")
def list_(
    limit: Limit = 20,
    kind: Annotated[
        str | None,
        typer.Option("--type", autocompletion=lambda: list(TYPES), callback=one_of(TYPES), help=", ".join(TYPES) + "."),
    ] = None,
    status: Annotated[
        str | None,
        typer.Option(autocompletion=lambda: list(STATUSES), callback=one_of(STATUSES), help=", ".join(STATUSES) + "."),
    ] = None,
    metadata: Metadata = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """List jobs. Prints id, type, status, progress, creation time and metadata."""
    with service_at(url, key) as client:
        found = islice(client.jobs.list(type=kind, status=status, metadata=pairs(metadata)), limit)
        print_list(("job", "type", "status", "done", "created", "metadata"), found, as_json, _row)


def _row(job: Job) -> tuple[str, ...]:
    done = f"{job.progress.percent_done:.0f}%" if job.progress else ""
    if job.queue_position is not None:
        done = f"{job.queue_position} before it"
    own = " ".join(f"{name}={value}" for name, value in job.metadata.items())
    return job.id, job.type, job.status, done, when(job.created_at), own


@app.command()
def show(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Print a job's record."""
    with service_at(url, key) as client:
        print_object(client.jobs.get(job), as_json)


@app.command()
def watch(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Follow a job to its end. With --json, print its events.

    Ctrl-C stops watching, and the job continues.
    """
    with service_at(url, key) as client:
        leave_unless_succeeded(follow(client, client.jobs.get(job), events=as_json))


def _changed(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        typer.echo(job.status)


@app.command()
def cancel(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Cancel a job. A training job keeps its last checkpoint."""
    with service_at(url, key) as client:
        _changed(client.jobs.cancel(job), as_json)


@app.command()
def pause(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Pause a training job. It writes a checkpoint and frees its worker."""
    with service_at(url, key) as client:
        _changed(client.jobs.pause(job), as_json)


@app.command()
def resume(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Resume a paused job from its last checkpoint."""
    with service_at(url, key) as client:
        _changed(client.jobs.resume(job), as_json)


@app.command()
def logs(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Print a training job's log lines. With --json, print an object for each line."""
    with service_at(url, key) as client:
        text = client.jobs.logs(job)
    for line in text.splitlines():
        if as_json:
            print_json({"line": line})
        else:
            typer.echo(line)


@app.command()
def attempts(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """List the attempts of a job. Prints number, status, begin, end, worker and reason."""
    with service_at(url, key) as client:
        print_list(
            ("attempt", "status", "began", "ended", "worker", "why"),
            client.jobs.attempts(job),
            as_json,
            lambda a: (
                str(a.attempt),
                a.status,
                when(a.started_at),
                when(a.ended_at),
                a.worker or "",
                a.message or "",
            ),
        )


@app.command()
def artifacts(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """List the files of a job. Prints name, bytes and sha256."""
    with service_at(url, key) as client:
        print_list(
            ("artifact", "bytes", "sha256"),
            client.jobs.artifacts(job),
            as_json,
            lambda a: (a.name, str(a.bytes), a.sha256),
        )


@app.command()
def download(
    job: JobId,
    names: Annotated[list[str] | None, typer.Argument(metavar="[ARTIFACT]...", help="By default all files.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", file_okay=False, help="Directory. By default the job's id.")
    ] = None,
    as_json: AsJson = False,
    url: Url = LOCAL,
    key: Key = "",
) -> None:
    """Download the files of a job. Prints their paths."""
    with service_at(url, key) as client:
        found = [artifact.name for artifact in client.jobs.artifacts(job)]
        wanted = names or found
        for name in wanted:
            if name not in found:
                raise typer.BadParameter(f"{job} has no artifact {name!r}; {meant(name, found) or 'it has none yet'}")
        for path in download_artifacts(client, job, wanted, output or Path(job)):
            if as_json:
                print_json({"path": str(path)})
            else:
                typer.echo(path)


@app.command()
def delete(job: JobId, as_json: AsJson = False, url: Url = LOCAL, key: Key = "") -> None:
    """Delete a job, its checkpoints and its files. A running job is cancelled first."""
    with service_at(url, key) as client:
        client.jobs.delete(job)
    if as_json:
        print_json({"id": job, "deleted": True})
