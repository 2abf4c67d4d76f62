"""Requests that may be sent twice: what one with an Idempotency-Key has created is noted with the record itself.

The note is written by the very script that writes the record (worker/lua): a process that dies between
the two cannot leave a record that the same request would create again.
"""

import json
import secrets
from dataclasses import dataclass
from typing import Any

from redis import Redis

from worker.connection import Script
from worker.refusals import Conflict, Invalid

UNDER_WAY_SECONDS = 60
"""A request that is not renewed for so long is lost with its process, and may be sent again."""

_IF_OURS = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call({}) end return 0"
_RENEW = _IF_OURS.format("'EXPIRE', KEYS[1], ARGV[2]")
_RELEASE = _IF_OURS.format("'DEL', KEYS[1]")


@dataclass(frozen=True)
class Once:
    """One request under its key. `existing` is the id of the object that the first one created or reused."""

    place: str
    mark: str
    existing: str | None
    fingerprint: str | None

    def claim(self, fingerprint: str) -> str:
        """What the record is written with. Raises `Invalid` where the first request was another one."""
        if self.fingerprint not in (None, fingerprint):
            raise Invalid("idempotency_key_reused", "this Idempotency-Key was sent before, with another request")
        return json.dumps({"key": self.place, "fingerprint": fingerprint})


class Idempotency:
    """The notes of one Redis server, kept for a day."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._renew = Script(redis, _RENEW)
        self._release = Script(redis, _RELEASE)

    def begin(self, owner: str, key: str) -> Once:
        """Raises `Conflict` while another request with this key is under way."""
        place = f"flowpp:created:{owner}:{key}"
        mark = json.dumps({"under_way": secrets.token_hex(8)})
        if self._redis.set(place, mark, nx=True, ex=UNDER_WAY_SECONDS):
            return Once(place, mark, None, None)
        said = json.loads(self._redis.get(place) or "{}")
        if "id" not in said:
            raise Conflict("idempotency_in_progress", "a request with this Idempotency-Key is under way; try again")
        return Once(place, mark, said["id"], said["fingerprint"])

    def renew(self, once: Once) -> None:
        """Says that the request is still under way."""
        self._renew(keys=[once.place], args=[once.mark, UNDER_WAY_SECONDS])

    def end(self, once: Once) -> None:
        """Of a request that has created nothing: another may try."""
        self._release(keys=[once.place], args=[once.mark])
