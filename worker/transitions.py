"""The transitions of jobs, each one Lua script of worker/lua: atomic, on Redis's clock, refusing what must not be.

flowpp:sequence              counts records, so that indices have the order of creation
flowpp:job:<id>              hash: the record
flowpp:job:<id>:events       stream
flowpp:job:<id>:checkpoints  set of the ids of its checkpoints
flowpp:jobs, flowpp:jobs:owner:<owner>, flowpp:jobs:status:<owner>:<type>:<status>  sorted sets of job ids by sequence
flowpp:owners                set of the owners of jobs
flowpp:indexed               '1' where all jobs are in the lists by status; while older ones are put there, '(' and the
                             sequence up to which they are; where it is deleted, all are listed anew
flowpp:unlisting             set of the owners whose lists by status are deleted before that
flowpp:unfinished:<owner>    set of the ids of an owner's unfinished jobs
flowpp:queued:<queue>        sorted set of the ids of waiting jobs by their turn
flowpp:turn:<queue>          hash: the turn of the job that was claimed last (''), and the next one of each owner
flowpp:awake:inference       sorted set of the workers that look into the queue without a bell, by when they cease to
flowpp:leases                sorted set of the ids of jobs that a worker holds, by the end of the lease
flowpp:training              sorted set of the ids of training jobs that a worker holds, by when it claimed them
flowpp:deadlines             sorted set of the ids of unfinished jobs by when they are cancelled
flowpp:expiring              sorted set of the ids of finished jobs by when they are deleted
flowpp:deleting              set of the ids of jobs that shall be deleted when they have ended
flowpp:uses:<id>             set of the ids of unfinished jobs that need a dataset or checkpoint
flowpp:dataset:<id>, flowpp:checkpoint:<id>, flowpp:key:<id>  records (JSON), indexed as jobs are: flowpp:datasets, ...
flowpp:contents:<owner>      hash: the id of an owner's newest dataset of each content, by its sha256
flowpp:bytes                 hash: the bytes of each owner's datasets and checkpoints
flowpp:changed               sorted set of the ids of jobs that are to be stored, or deleted there, by when they changed
flowpp:recorder              whose turn it is to store them
flowpp:rebuilding            there while `flowpp reindex` has not come to its end
flowpp:finished              channel on which the ids of jobs that end are published, with spaces between
flowpp:created:<owner>:<key> what a request with this Idempotency-Key has created, or that one is under way
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any, Literal, get_args

from redis import Redis
from redis.exceptions import ResponseError

from worker.connection import UNREACHABLE, Script

MAX_EVENTS = 100_000
"""Events kept of a job, about; the oldest give way."""

RESULT_TTL_SECONDS = 7 * 86_400
"""For so long the results of likelihood and sampling jobs are kept."""

JobType = Literal["training", "likelihood", "sampling"]
JobStatus = Literal["queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"]

_WEBHOOK_LIMITS = {
    "MAX_WAITING": 10_000,  # deliveries of a webhook; events beyond are dropped, and counted
    "MAX_ENDED": 100,  # deliveries of a webhook that are over and still shown
    "MAX_AT_ONCE": 2,  # deliveries of a webhook, by all processes together
    "MAX_RESULT": 4_096,  # bytes of a job's result that a delivery carries
    "MAX_FAILING": 5 * 86_400,  # seconds of nothing but failures
}


def job_key(job_id: str) -> str:
    return f"flowpp:job:{job_id}"


@cache
def _source(name: str) -> str:
    return (files("worker") / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def _record(fields: Sequence[str]) -> dict[str, str]:
    """A hash as a script gives it: names and values in turns."""
    return dict(zip(fields[::2], fields[1::2], strict=True))


def _table(names: Sequence[str]) -> str:
    """As Lua writes it."""
    return "{" + ", ".join(f"'{name}'" for name in names) + "}"


def load_script(redis: Redis, name: str, result_ttl_seconds: int = RESULT_TTL_SECONDS) -> Any:
    """A script of worker/lua, behind what all of them share."""
    limits = {"MAX_EVENTS": MAX_EVENTS, "RESULT_TTL": result_ttl_seconds, **_WEBHOOK_LIMITS}
    names = {"TYPES": _table(get_args(JobType)), "STATUSES": _table(get_args(JobStatus))}
    constants = "".join(f"local {constant} = {value}\n" for constant, value in {**limits, **names}.items())
    shared = constants + _source("prelude") + _source("webhooks")
    ended = "local answer = main()\nwrite()\nreturn answer\n"
    return Script(redis, f"{shared}local function main()\n{_source(name)}end\n{ended}")


class Transitions:
    """The scripts of one Redis server. Those for workers answer None where the attempt is stale."""

    def __init__(self, redis: Redis, result_ttl_seconds: int = RESULT_TTL_SECONDS) -> None:
        def script(name: str) -> Any:
            return load_script(redis, name, result_ttl_seconds)

        self._submit = script("submit")
        self._claim = script("claim")
        self._sleep = script("sleep")
        self._renew = script("renew")
        self._matching = script("matching")
        self._set_field = script("set_field")
        self._append = script("append")
        self._end = script("end")
        self._reap = script("reap")
        self._cancel_due = script("cancel_due")
        self._register = script("register")
        self._reuse = script("reuse")
        self._unregister = script("unregister")
        self._recorded = script("recorded")
        self._restore = script("restore")
        self._restore_record = script("restore_record")
        self._asked = {
            "cancel": script("cancel"),
            "pause": script("pause"),
            "resume": script("resume"),
            "delete": script("delete"),
        }

    def submit(
        self, submissions: Sequence[tuple[str, int, int, str, Mapping[str, str]]]
    ) -> list[str | tuple[bool, dict[str, str]]]:
        """Of jobs, each by (id, max_queued, max_jobs, claim, fields), whether each worker looks without a bell, and the
        record of the job, which is queued now.

        Else why it is not: 'full', 'quota', or the id of what it uses and does not exist.
        """
        arguments: list[str | int] = []
        for job_id, max_queued, max_jobs, claim, fields in submissions:
            arguments += (job_id, max_queued, max_jobs, claim, len(fields), *chain.from_iterable(fields.items()))
        return [
            answer if isinstance(answer, str) else (bool(answer[0]), {**fields, **_record(answer[1])})
            for (*_, fields), answer in zip(submissions, self._submit(args=arguments), strict=True)
        ]

    def claim(
        self, queue: str, worker: str, lease_seconds: float, capacity: int, large: int, larges: int, awake: float
    ) -> list[tuple[str, dict[str, str]]]:
        """The ids and records of the jobs that now run under a lease of `worker`."""
        taken = self._claim(args=[queue, worker, lease_seconds, capacity, large, larges, awake])
        return [(job_id, _record(fields)) for job_id, fields in taken]

    def sleep(self, queue: str, worker: str) -> bool:
        """Whether nothing waits, so that the worker may wait for a bell."""
        return bool(self._sleep(args=[queue, worker]))

    def renew(self, held: Sequence[tuple[str, int]], lease_seconds: float) -> list[str | None]:
        """The statuses of jobs, each by its id and attempt; 0 seconds leave the leases as they are."""
        return [wish or None for wish in self._renew(args=[lease_seconds, *chain.from_iterable(held)])] if held else []

    def matching(self, ids: Sequence[str], metadata: Mapping[str, str]) -> list[str]:
        """Those of the jobs that have all these metadata."""
        return self._matching(args=[json.dumps(metadata), *ids])

    def set_field(self, job_id: str, attempt: int, field: str, value: str) -> str | None:
        """The job's status."""
        return self._set_field(args=[job_id, attempt, field, value])

    def append(self, job_id: str, attempt: int, kind: str, data: str) -> str | None:
        """The id of the new event."""
        return self._append(args=[job_id, attempt, kind, data])

    def end(self, endings: Sequence[Sequence[str | int]]) -> list[str | None]:
        """The jobs' new statuses, each by (id, attempt, outcome, code, message, result, artifacts, progress)."""
        try:
            return list(self._end(args=list(chain.from_iterable(endings))))
        except UNREACHABLE:  # the server refuses all of them
            raise
        except ResponseError:
            if len(endings) == 1:
                raise
        answers, faults = list[str | None](), list[ResponseError]()
        for ending in endings:  # nothing was written, and what is wrong with one is not the others' business
            try:
                answers += self.end([ending])
            except UNREACHABLE:
                raise
            except ResponseError as error:
                faults.append(error)
        if faults:
            raise faults[0]
        return answers

    def reap(self, lease_seconds: float, may_end: bool) -> list[str]:
        """The ids of the jobs whose attempt was ended; none is where `may_end` forbids it."""
        return self._reap(args=[lease_seconds, int(may_end)])

    def cancel_due(self) -> list[str]:
        """The ids of the jobs whose time to be cancelled has come: they are so now, or cancelling."""
        return self._cancel_due()

    def ask(self, transition: str, job_id: str) -> str:
        """The job's new status, 'missing', or 'refused' with the status that forbids it."""
        return self._asked[transition](args=[job_id])

    def register(
        self, kind: str, record_id: str, record: str, job_id: str = "", attempt: int = 0, claim: str = "", most: int = 0
    ) -> bool:
        """Whether the record was written: one of a job only where the attempt is current, and not beyond the `most`
        that its owner may have of the kind, if that is given."""
        return bool(self._register(args=[kind, record_id, record, job_id, attempt, claim, most]))

    def reuse(self, kind: str, record_id: str, claim: str) -> bool:
        """Returns whether the record exists; if it does, it is noted for the idempotency key of `claim`."""
        return bool(self._reuse(args=[kind, record_id, claim]))

    def unregister(self, kind: str, record_id: str, job_id: str = "") -> str:
        """'deleted', 'missing' or 'in_use'."""
        return self._unregister(args=[kind, record_id, job_id])

    def recorded(self, stored: Sequence[tuple[str, str]]) -> list[str]:
        """Says of jobs that their records of `changed` are stored; which to delete now: '' none, 'missing' all."""
        return self._recorded(args=list(chain.from_iterable(stored)))

    def restore(self, job_id: str, fields: Mapping[str, str], lost: str) -> str:
        """The status of a job whose events are there; the event of one that was held says `lost`."""
        return self._restore(args=[job_id, json.dumps(fields), lost])

    def restore_record(self, kind: str, record_id: str, record: str, sequence: int) -> bool:
        """Whether a dataset, checkpoint or key was not there yet."""
        return bool(self._restore_record(args=[kind, record_id, record, sequence]))
