"""Garbage: what is in the artifact store and on this machine's disk, and no record in Redis refers to.

It comes of processes that were killed between two steps: uploads that were not registered, records that were deleted
before their files, temporary files.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from worker.artifacts import Listed, delete_directory
from worker.jobs import TERMINAL
from worker.rebuilding import KINDS, is_empty, under_way
from worker.recorder import changed_of
from worker.refusals import Conflict
from worker.service import Service
from worker.transitions import job_key

GRACE_SECONDS = 3600
"""What was written since is left alone, since it may be on its way: longer than an upload takes."""

_TEMPORARY = re.compile(r"(^|/)\.[^/]+\.tmp(/|$)")


class Garbage(BaseModel):
    """One thing that nothing refers to, and its bytes."""

    name: str
    bytes: int


def collect(service: Service, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False) -> list[Garbage]:
    """Deletes what nothing refers to and was not written to for `grace_seconds`, or only says what that is.

    Raises `Conflict` where Redis is empty while the store is not, or is being rebuilt: all would be deleted.
    """
    folders = (*KINDS.values(), "jobs")
    listings = {folder: service.store.listing(folder) for folder in (*folders, "checks")}
    if under_way(service) or (is_empty(service) and any(listings[folder] for folder in folders)):
        raise Conflict("not_indexed", "Redis knows nothing of what is in the store; run `flowpp reindex` first")
    before = time.time() - grace_seconds
    found: list[Garbage] = []
    for folder, files in listings.items():  # which are older than what is asked of Redis now
        places = {
            place: its_files
            for place, its_files in _unreferenced(service, folder, files)
            if max(file.modified_at for file in its_files) < before
        }
        for place, its_files in places.items():
            found.append(Garbage(name=place, bytes=sum(file.bytes for file in its_files)))
            if not dry_run:
                service.store.delete(place)
        within = {file for its_files in places.values() for file in its_files}
        for file in files:
            if _TEMPORARY.search(file.name) and file.modified_at < before and file not in within:
                found.append(Garbage(name=f"{folder}/{file.name}", bytes=file.bytes))
                if not dry_run:
                    service.store.remove(folder, file)
    for upload in service.store.uploads():
        if upload.began_at < before:
            found.append(Garbage(name=f"parts of {upload.name}", bytes=0))
            if not dry_run:
                service.store.abort(upload)
    return found + list(_local(service, before, dry_run))


def _unreferenced(service: Service, folder: str, files: Sequence[Listed]) -> Iterator[tuple[str, list[Listed]]]:
    """Prefixes in the store, with their files."""
    things = _grouped(files, 1)
    known = _known(service, folder, list(things))
    for name, its_files in things.items():
        if name not in known:
            yield f"{folder}/{name}", its_files
        elif folder == "jobs":
            yield from _outdated(service, name, its_files)


def _outdated(service: Service, job_id: str, files: Sequence[Listed]) -> Iterator[tuple[str, list[Listed]]]:
    """Earlier records of a job, and what attempts have left beside the artifacts of its end."""
    redis: Any = service.redis
    status, artifacts, recorded = redis.hmget(job_key(job_id), "status", "artifacts", "recorded")
    for name, its_files in _grouped(files, 2).items():
        place, part = f"jobs/{name}", name.partition("/")[2]
        if (changed := changed_of(part)) is not None:
            unneeded = recorded is not None and changed != recorded
        else:
            unneeded = part.startswith("attempt-") and status in TERMINAL and place != artifacts
        if unneeded:
            yield place, its_files


def _grouped(files: Iterable[Listed], depth: int) -> dict[str, list[Listed]]:
    """By the first `depth` parts of their names; those of fewer parts, and temporary ones, are left out."""
    found = defaultdict(list)
    for file in files:
        parts = file.name.split("/")
        if not _TEMPORARY.search("/".join(parts[:depth])):
            found["/".join(parts[:depth])].append(file)
    return found


def _known(service: Service, folder: str, names: Sequence[str]) -> set[str]:
    """Those of these ids that have a record."""
    kinds = {plural: kind for kind, plural in KINDS.items()} | {"jobs": "job"}
    if folder not in kinds:
        return set()
    with service.redis.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.exists(f"flowpp:{kinds[folder]}:{name}")
        return {name for name, there in zip(names, pipeline.execute(), strict=True) if there}


def _local(service: Service, before: float, dry_run: bool) -> Iterator[Garbage]:
    """Copies and run directories, on this machine, of what is not there any more, or has ended."""
    data = service.settings.data_directory.absolute()
    for folder in KINDS.values():
        places = _directories(data / "cache" / folder)
        known = _known(service, folder, [place.name for place in places])
        yield from _removed((place for place in places if place.name not in known), before, dry_run)
    runs = _directories(data / "runs")
    redis: Any = service.redis
    ended = [run for run in runs if redis.hget(job_key(run.name), "status") in (None, *TERMINAL)]
    yield from _removed(ended, before, dry_run)


def _directories(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []


def _removed(places: Iterable[Path], before: float, dry_run: bool) -> Iterator[Garbage]:
    for place in places:
        paths = [place, *place.rglob("*")]
        if max(path.lstat().st_mtime for path in paths) < before:
            yield Garbage(name=str(place), bytes=sum(path.lstat().st_size for path in paths if path.is_file()))
            if not dry_run:
                delete_directory(place)
