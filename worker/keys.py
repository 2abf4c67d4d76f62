"""API keys: who may ask what of the service. Of a key's secret only the hash is kept, in Redis and in the store."""

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints
from redis import Redis

from flowpp.config import Frozen
from worker.artifacts import ArtifactStore
from worker.owners import LOCAL
from worker.paging import Order, Page, read_page
from worker.refusals import NotFound
from worker.transitions import Transitions

Scope = Literal["read", "submit", "admin"]
Owner = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$"),
    Field(description="Whose jobs, datasets and checkpoints the key's are.", examples=["alice"]),
]

_PREFIX = "flowpp"


class Quota(Frozen):
    """What an owner may take; none: what the service's settings say."""

    requests_per_minute: int | None = Field(None, ge=1, description="Of this key.")
    max_jobs: int | None = Field(None, ge=1, description="Jobs of the owner that have not finished.")
    max_bytes: int | None = Field(None, ge=0, description="Bytes of the owner's datasets and checkpoints.")
    max_images: int | None = Field(None, ge=1, description="Images, or samples, of one request.")


class NewKey(Frozen):
    """A key to be made."""

    owner: Owner
    scopes: tuple[Scope, ...] = Field(
        ("read", "submit"),
        min_length=1,
        max_length=3,
        description="read: GET. submit: also create, change and delete what is the owner's. admin: everything of "
        "everybody, and keys.",
    )
    quota: Quota = Quota()


class Key(Frozen):
    """What is known of a key."""

    id: str
    object: Literal["key"] = "key"
    created_at: float = Field(description="Unix seconds.")
    owner: Owner
    scopes: tuple[Scope, ...]
    quota: Quota = Quota()


class _Record(Key):
    secret_sha256: str


@dataclass(frozen=True)
class Caller:
    """Who asks: a key's owner, with what the key allows."""

    owner: str = LOCAL
    scopes: frozenset[str] = frozenset({"admin"})
    quota: Quota = field(default_factory=Quota)
    key: str | None = None

    @property
    def sees(self) -> str | None:
        """The owner whose objects it may see; none: everybody's."""
        return None if "admin" in self.scopes else self.owner

    def may(self, scope: Scope) -> bool:
        return bool(self.scopes & {scope, "admin"}) or (scope == "read" and "submit" in self.scopes)


ANYBODY = Caller()
"""Who asks where authentication is off."""


class Keys:
    """The keys of one Redis server and store."""

    def __init__(self, redis: Redis, store: ArtifactStore) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._store = store
        self._scripts = Transitions(redis)

    def create(self, new: NewKey) -> tuple[Key, str]:
        """The key, and the token that is sent as `Authorization: Bearer`, which cannot be had again."""
        identity, secret = secrets.token_hex(12), secrets.token_urlsafe(32)
        record = _Record(
            id=f"key_{identity}",
            created_at=time.time(),
            owner=new.owner,
            scopes=new.scopes,
            quota=new.quota,
            secret_sha256=_hash(secret),
        )
        place = f"keys/{record.id}"
        try:
            self._store.put_record(place, record.model_dump(mode="json"))
            self._scripts.register("key", record.id, record.model_dump_json())
        except BaseException:
            self._store.delete(place)
            raise
        return Key(**record.model_dump(exclude={"secret_sha256"})), f"{_PREFIX}_{identity}_{secret}"

    def page(self, *, after: str | None = None, limit: int = 20, order: Order = "desc") -> Page[Key]:
        """By creation. Raises `NotFound` where there is no key `after`."""

        def load(ids: list[str]) -> list[Key]:
            records = self._redis.mget([record_key(key_id) for key_id in ids])
            return [
                Key(**_Record.model_validate_json(record).model_dump(exclude={"secret_sha256"}))
                for record in records
                if record
            ]

        try:
            return read_page(self._redis, "flowpp:keys", load, after=after, limit=limit, order=order)
        except KeyError as error:
            raise _not_found(str(after)) from error

    def revoke(self, key_id: str) -> None:
        """From now on it opens nothing. Raises `NotFound`."""
        if self._scripts.unregister("key", key_id) == "missing":
            raise _not_found(key_id)
        self._store.delete(f"keys/{key_id}")


def record_key(key_id: str) -> str:
    """Where Redis has the record of a key."""
    return f"flowpp:key:{key_id}"


def id_of(token: str) -> str | None:
    """The id of the key that a token is said to be of; none for what is no token."""
    prefix, _, rest = token.partition("_")
    identity, _, secret = rest.partition("_")
    known = prefix == _PREFIX and len(identity) == 24 and identity.isalnum() and identity.isascii() and secret
    return f"key_{identity}" if known else None


def caller_of(token: str, record: str | None) -> Caller | None:
    """Who has sent a token, by the record of its key; none where it is not that key's.

    Takes as long for a wrong secret as for a right one, and for a key that there is not.
    """
    secret = token.split("_", 2)[-1]
    key = _Record.model_validate_json(record) if record else None
    right = hmac.compare_digest(_hash(secret), key.secret_sha256 if key else _hash(""))
    if key is None or not right:
        return None
    return Caller(key.owner, frozenset(key.scopes), key.quota, key.id)


def _hash(secret: str) -> str:
    """A random secret of 256 bits needs no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _not_found(key_id: str) -> NotFound:
    return NotFound("key_not_found", f"there is no key {key_id[:64]}")
