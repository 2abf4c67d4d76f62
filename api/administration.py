"""`flowpp keys`, `reindex`, `backup`, `gc`: commands for the machine that has the Redis server and the store."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from api.stack import REDIS_URL, StackError, lock
from flowpp.names import meant
from worker.redis_server import RedisServer
from worker.refusals import Refusal

if TYPE_CHECKING:
    from worker.keys import Key
    from worker.service import Service

# Commands import the service themselves: it takes as long as all else of `flowpp`, which the other commands, completion
# and --help need not wait for.

keys = typer.Typer(
    no_args_is_help=True,
    help="API keys. Run these commands on the service's machine, with the FLOWPP_REDIS_URL and FLOWPP_STORE of the "
    "service, or with the data directory of `flowpp serve`.",
)

Data = Annotated[Path, typer.Option(help="Data directory of `flowpp serve`, if FLOWPP_REDIS_URL is not set.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def service_beside(data: Path) -> Iterator["Service"]:
    """The service's records: of the environment's Redis server, of a running stack's, or of a resting one's.

    Raises `StackError` if they cannot be read or written.
    """
    from worker.connection import UNREACHABLE

    try:
        with _service(data) as service:
            yield service
    except UNREACHABLE as error:
        raise StackError(f"Redis cannot be used now: {error}") from error


@contextmanager
def _service(data: Path) -> Iterator["Service"]:
    from worker.service import Service
    from worker.settings import from_environment

    if "redis_url" in from_environment().model_fields_set:
        with Service(from_environment()) as service:
            yield service
        return
    if not any((data / each).exists() for each in ("redis", "store", "lock")):  # its Redis server may have been lost
        raise StackError(f"{data} is no data directory of `flowpp serve`; name it by --data, or set FLOWPP_REDIS_URL")
    own = from_environment(data_directory=data)
    url = data / REDIS_URL
    try:
        held = lock(data)
    except StackError:
        if not url.exists():
            raise
        with Service(own.model_copy(update={"redis_url": url.read_text().strip()})) as service:
            yield service
        return
    (data / "logs").mkdir(exist_ok=True)
    with (
        held,
        RedisServer(data / "redis", log=data / "logs" / "redis.log", pass_fds=[held.fileno()]) as server,
        Service(own.model_copy(update={"redis_url": server.url})) as service,
    ):
        yield service


@keys.command("create")
def create_key(
    owner: Annotated[str, typer.Option(help="Owner of what the key creates: lower case letters, digits and . _ -")],
    scope: Annotated[
        list[str], typer.Option(help="read: GET. submit: also create, change, delete. admin: all of everybody. Repeat.")
    ] = ["submit"],  # noqa: B006  # typer copies it
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Else as the settings say.")] = None,
    max_jobs: Annotated[int | None, typer.Option(min=1, help="The owner's jobs that have not finished.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=0, help="Of the owner's datasets and checkpoints.")] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Images, or samples, of one request.")] = None,
    data: Data = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Create a key. Prints its token, which cannot be printed again.

    Commands take it as --key or FLOWPP_API_KEY, and HTTP requests as `Authorization: Bearer TOKEN`.
    """
    from worker.keys import NewKey, Quota, Scope

    for each in scope:
        if each not in (known := get_args(Scope)):
            raise typer.BadParameter(f"--scope: {each!r} is unknown; {meant(each, known)}")
    quota = Quota(
        requests_per_minute=requests_per_minute, max_jobs=max_jobs, max_bytes=max_bytes, max_images=max_images
    )
    try:
        new = NewKey.model_validate({"owner": owner, "scopes": scope, "quota": quota})
    except ValidationError as error:
        fault = error.errors()[0]
        option, message = f"--{fault['loc'][0]}", fault["msg"]
        if option == "--owner":
            message = f"{owner!r} is no owner's name; write up to 64 lower case letters, digits and . _ -"
        raise typer.BadParameter(f"{option}: {message}") from error
    with service_beside(data) as service:
        key, token = service.keys.create(new)
    if as_json:
        typer.echo(json.dumps(key.model_dump(mode="json") | {"token": token}))
    else:
        typer.echo(f"{key.id} of {key.owner}, which may {', '.join(key.scopes)}. It is shown this once:", err=True)
        typer.echo(token)


@keys.command("list")
def list_keys(data: Data = Path("data"), as_json: AsJson = False) -> None:
    """List keys, newest first. Secrets are not printed."""
    with service_beside(data) as service:
        found = _all(service)
    if as_json:
        for key in found:
            typer.echo(key.model_dump_json())
        return
    table = Table("key", "owner", "scopes", "created", box=None)
    for key in found:
        created = datetime.fromtimestamp(key.created_at).isoformat(" ", "seconds")
        table.add_row(key.id, key.owner, " ".join(key.scopes), created)
    Console().print(table)


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="KEY")], data: Data = Path("data"), as_json: AsJson = False
) -> None:
    """Revoke a key."""
    with service_beside(data) as service:
        try:
            service.keys.revoke(key)
        except Refusal as error:
            raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps({"id": key, "revoked": True}))


def reindex(data: Data = Path("data"), as_json: AsJson = False) -> None:
    """Rebuild an empty Redis from the store.

    It restores keys, webhooks, datasets, checkpoints, and jobs with their events. Unfinished jobs are queued again,
    and continue from their newest checkpoints. Idempotency keys and rate limits are not kept. Nobody may use the
    service meanwhile. Exits with 2 if Redis has records already.
    """
    from worker.rebuilding import rebuild

    with service_beside(data) as service:
        try:
            rebuilt = rebuild(service)
        except Refusal as error:
            raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(rebuilt.model_dump_json())
        return
    for fault in rebuilt.damaged:
        typer.echo(f"left out: {fault}", err=True)
    counts = rebuilt.model_dump(exclude={"damaged"})
    typer.echo(", ".join(f"{count:,} {kind}" for kind, count in counts.items()))


def backup(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A directory, or s3://bucket/folder.")],
    data: Data = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Copy the store to another place.

    `flowpp reindex` rebuilds the service from the copy on an empty machine. The service may run meanwhile. A second
    backup to the same place copies new objects, and deletes those that are gone. Damaged objects are left out, and
    the command exits with 1. It exits with 2 if the store is empty.
    """
    from worker.artifacts import ArtifactStore
    from worker.backup import back_up
    from worker.settings import from_environment

    store = from_environment(data_directory=data).store_url
    try:
        done = back_up(ArtifactStore(store), ArtifactStore(target))
    except Refusal as error:
        raise typer.BadParameter(f"{store}: {error}") from error
    if as_json:
        typer.echo(done.model_dump_json())
    else:
        for fault in done.damaged:
            typer.echo(f"left out: {fault}", err=True)
        counts = done.model_dump(exclude={"damaged"})
        typer.echo(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    if done.damaged:
        raise typer.Exit(1)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the objects, and delete nothing.")] = False,
    grace: Annotated[
        float | None, typer.Option(min=0, help="Keep objects younger than this, in seconds. By default an hour.")
    ] = None,
    data: Data = Path("data"),
    as_json: AsJson = False,
) -> None:
    """Delete objects that no record refers to.

    They are deleted from the store and from the caches of this machine. The service may run meanwhile. Exits with 2
    if Redis is empty and the store is not; run `flowpp reindex` then.
    """
    from worker.garbage import GRACE_SECONDS, collect

    with service_beside(data) as service:
        try:
            found = collect(service, GRACE_SECONDS if grace is None else grace, dry_run)
        except Refusal as error:
            raise typer.BadParameter(str(error)) from error
    freed = sum(each.bytes for each in found)
    if as_json:
        typer.echo(json.dumps({"bytes": freed, "dry_run": dry_run, "garbage": [each.model_dump() for each in found]}))
        return
    for each in found:
        typer.echo(f"{each.name}  {each.bytes:,}")
    typer.echo(f"{freed:,} bytes {'would be' if dry_run else 'were'} freed", err=True)


def _all(service: "Service") -> list["Key"]:
    found: list[Key] = []
    more = True
    while more:
        page = service.keys.page(after=found[-1].id if found else None, limit=100)
        found += page.data
        more = page.has_more
    return found
