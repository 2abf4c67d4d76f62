"""Rebuilding an empty Redis from the artifact store alone: `flowpp reindex`.

What comes back: keys, webhooks, datasets, checkpoints, and jobs with their events and thereby metrics, logs and
attempts, all in the order of their creation. What does not: notes of idempotency keys, what was counted for rate
limits, and deliveries to webhooks. An unfinished job that a worker held waits again (or is paused or cancelled, where
that was wished), with a status event that says why, and goes on from its newest checkpoint.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel

from worker.artifacts import MANIFEST, DamagedArtifact, Manifest
from worker.jobs import TERMINAL
from worker.recorder import changed_of
from worker.refusals import Conflict, NotFound
from worker.service import Service
from worker.transitions import Transitions, job_key

KINDS = {"key": "keys", "webhook": "webhooks", "dataset": "datasets", "checkpoint": "checkpoints"}
"""Kinds of records beside jobs, and the folders they have in the store."""

LOST = "Redis was lost while a worker held the job"

_REBUILDING = "flowpp:rebuilding"
_INDICES = ("flowpp:jobs", "flowpp:datasets", "flowpp:checkpoints", "flowpp:keys", "flowpp:webhooks")
_THREADS = 8
_AT_A_TIME = 1_000


class Rebuilt(BaseModel):
    """What `rebuild` has found in the store."""

    keys: int = 0
    webhooks: int = 0
    datasets: int = 0
    checkpoints: int = 0
    jobs: int = 0
    damaged: list[str] = []


def is_empty(service: Service) -> bool:
    """Whether Redis has no records."""
    return not service.redis.exists(*_INDICES)


def under_way(service: Service) -> bool:
    """Whether a rebuilding has begun and not come to its end."""
    return bool(service.redis.exists(_REBUILDING))


def rebuild(service: Service) -> Rebuilt:
    """Writes all that is in the store into Redis; one that was interrupted is taken up again.

    Raises `Conflict` where Redis has records that no rebuilding has written.
    """
    if not is_empty(service) and not under_way(service):
        raise Conflict("not_empty", "Redis has records; it can be rebuilt only where it is empty")
    redis: Any = service.redis
    redis.set(_REBUILDING, "1")
    scripts, rebuilt = Transitions(service.redis), Rebuilt()
    for kind, folder in KINDS.items():  # before the jobs, which need them as soon as they wait
        found = sorted(_manifests(service, _places(service, folder), rebuilt), key=lambda manifest: manifest.created_at)
        for sequence, manifest in enumerate(found, 1):
            scripts.restore_record(kind, manifest.record["id"], json.dumps(manifest.record), sequence)
        setattr(rebuilt, folder, len(found))
    for manifest in _manifests(service, _job_places(service), rebuilt):
        _restore(service, scripts, manifest.record["fields"], manifest.record["events"])
        rebuilt.jobs += 1
    redis.delete(_REBUILDING)
    return rebuilt


def _places(service: Service, folder: str) -> list[str]:
    """Of what is stored directly in a folder."""
    names = (file.name.split("/") for file in service.store.listing(folder))
    return [f"{folder}/{name[0]}" for name in names if len(name) == 2 and name[1] == MANIFEST]


def _job_places(service: Service) -> list[str]:
    """Of each job's newest record: a manifest alone, or the directory that older versions have made for it."""
    newest: dict[str, tuple[int, str]] = {}
    for file in service.store.listing("jobs"):
        job_id, _, name = file.name.removesuffix(f"/{MANIFEST}").partition("/")
        changed = changed_of(name)
        if changed is not None and "/" not in name:
            newest[job_id] = max(newest.get(job_id, (0, "")), (int(changed), f"jobs/{job_id}/{name}"))
    return [place for _, place in newest.values()]


def _manifests(service: Service, places: list[str], rebuilt: Rebuilt) -> Iterator[Manifest]:
    """Those that are whole; the others' names are noted."""

    def read(where: str) -> Manifest | None:
        try:
            return service.store.manifest(where)
        except DamagedArtifact as error:
            rebuilt.damaged.append(str(error))
        except NotFound:  # deleted meanwhile
            pass
        return None

    with ThreadPoolExecutor(_THREADS, "rebuild") as threads:
        for start in range(0, len(places), _AT_A_TIME):
            yield from filter(None, threads.map(read, places[start : start + _AT_A_TIME]))


def _restore(service: Service, scripts: Transitions, fields: dict[str, str], events: str) -> None:
    job_id = fields["id"]
    redis: Any = service.redis
    if redis.exists(job_key(job_id)):  # by the rebuilding that was interrupted
        return
    stream = f"{job_key(job_id)}:events"
    redis.delete(stream)
    lines = events.splitlines()
    for start in range(0, len(lines), _AT_A_TIME):
        with redis.pipeline(transaction=False) as pipeline:
            for event_id, type, data in map(json.loads, lines[start : start + _AT_A_TIME]):
                pipeline.xadd(stream, {"type": type, "data": data}, id=event_id)
            pipeline.execute()
    if fields["status"] not in TERMINAL and fields.get("artifacts") and not _is_stored(service, fields["artifacts"]):
        fields = fields | {"artifacts": ""}  # newer ones had come, which are not known of
    scripts.restore(job_id, fields, LOST)


def _is_stored(service: Service, where: str) -> bool:
    try:
        service.store.manifest(where)
    except (NotFound, DamagedArtifact):
        return False
    return True
