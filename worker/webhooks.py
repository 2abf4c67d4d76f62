"""Webhooks: where an owner is told of its jobs' events, and the deliveries that wait to be sent there, or were.

An event becomes a delivery for each webhook that wants it in the very script that writes the event (worker/lua): none
is lost between the two. Who sends them knows HTTP, and claims each under a lease: `claim` and `end`.

flowpp:webhook:<id>          the record (JSON), indexed as keys are: flowpp:webhooks, ...
flowpp:webhook:<id>:pending  sorted set of delivery ids by when they are due; while one is sent, by the end of its lease
flowpp:webhook:<id>:taken    sorted set of the ids of deliveries under way, by the end of the lease
flowpp:webhook:<id>:ended    list of the ids of the last deliveries that are over
flowpp:webhook:<id>:state    hash: disabled_reason, failing_since, dropped
flowpp:delivery:<id>         hash
flowpp:deliveries            sorted set of the ids of webhooks with pending deliveries, by when to look at them
"""

import base64
import json
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field
from redis import Redis

from flowpp.config import Frozen
from worker.artifacts import ArtifactStore
from worker.owners import LOCAL, index_of
from worker.paging import Order, Page, read_page
from worker.refusals import OverQuota, QueueFull, not_found
from worker.transitions import Transitions, load_script

WebhookEvent = Literal[
    "job.queued", "job.running", "job.paused", "job.succeeded", "job.failed", "job.cancelled", "job.checkpoint"
]
EVENTS: tuple[WebhookEvent, ...] = get_args(WebhookEvent)

MAX_WEBHOOKS = 20
"""Of an owner."""

_SHOWN = 100


class NewWebhook(Frozen):
    """A webhook to be made."""

    url: str = Field(
        min_length=1,
        max_length=2_048,
        description="http or https, at a public address; without user, password and fragment.",
        examples=["https://example.com/flowpp"],
    )
    events: tuple[WebhookEvent, ...] = Field(EVENTS, min_length=1, max_length=20, description="By default all.")


class _Record(NewWebhook):
    """What Redis and the store keep of a webhook."""

    id: str
    owner: str = LOCAL
    created_at: float
    secret: str = Field(repr=False)


class Webhook(Frozen):
    """Where the owner of jobs is told of their events."""

    id: str
    object: Literal["webhook"] = "webhook"
    owner: str = Field(description="Whose jobs it is told of.")
    created_at: float = Field(description="Unix seconds.")
    url: str
    events: tuple[WebhookEvent, ...]
    status: Literal["active", "disabled"] = Field(description="A ping that is delivered makes it active again.")
    disabled_reason: str | None = Field(None, description="In words.")
    dropped: int = Field(0, description="Events that are not delivered, as too many deliveries waited.")


class CreatedWebhook(Webhook):
    """A webhook, once with its secret."""

    secret: str = Field(repr=False, description="Verifies what it receives. It is shown this once.")


class Delivery(Frozen):
    """An event on its way to a webhook, or at the end of it."""

    id: str = Field(description="The header `webhook-id`: the same at each attempt.")
    object: Literal["webhook_delivery"] = "webhook_delivery"
    type: WebhookEvent | Literal["ping"]
    created_at: float = Field(description="Unix seconds, as the other times.")
    status: Literal["pending", "delivered", "dead"] = Field(description="dead: it is not tried again.")
    attempts: int
    last_attempt_at: float | None = None
    next_attempt_at: float | None = None
    status_code: int | None = Field(None, description="Of the last answer.")
    error: str | None = Field(None, description="Why the last attempt failed, in words.")


@dataclass(frozen=True)
class Attempt:
    """A delivery that is to be sent now, for the `number`th time."""

    id: str
    number: int
    type: str
    body: str
    url: str
    secret: str
    webhook: str


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt. After `retry_seconds` there is another one; none: it is over."""

    status: Literal["delivered", "failed", "gone"]
    status_code: int | None = None
    error: str = ""
    retry_seconds: float | None = None


class Webhooks:
    """The webhooks of one Redis server and store."""

    def __init__(self, redis: Redis, store: ArtifactStore) -> None:
        self._redis: Any = redis  # its annotations do not know of decode_responses
        self._store = store
        self._scripts = Transitions(redis)
        self._deliveries = load_script(redis, "deliveries")  # in one step: they change while they are read
        self._ping = load_script(redis, "ping")
        self._claim = load_script(redis, "claim_deliveries")
        self._end = load_script(redis, "end_delivery")
        self._delete = load_script(redis, "delete_webhook")

    # Everybody

    def create(self, new: NewWebhook, owner: str = LOCAL, claim: str = "") -> CreatedWebhook:
        """From now on it is told of the owner's jobs. Its address is for the caller to check.

        `claim` is of an idempotency key. Raises `OverQuota` where the owner has `MAX_WEBHOOKS` already.
        """
        record = _Record(
            id=f"wh_{secrets.token_hex(12)}",
            owner=owner,
            created_at=time.time(),
            url=new.url,
            events=tuple(event for event in EVENTS if event in new.events),
            secret=f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}",
        )
        place = f"webhooks/{record.id}"
        try:
            with tempfile.TemporaryDirectory() as empty:
                self._store.put(place, Path(empty), record.model_dump(mode="json"))
            if not self._scripts.register(
                "webhook", record.id, record.model_dump_json(), claim=claim, most=MAX_WEBHOOKS
            ):
                raise OverQuota(f"{owner} has {MAX_WEBHOOKS} webhooks, and may not have more: delete one first")
        except BaseException:
            self._store.delete(place)
            raise
        return _shown_once(record, {})

    def created(self, webhook_id: str) -> CreatedWebhook:
        """What `create` has answered, for whoever sends that request again. Raises `NotFound`."""
        for record, state in self._records([webhook_id]):
            return _shown_once(record, state)
        raise not_found("webhook", webhook_id)

    def get(self, webhook_id: str, owner: str | None = None) -> Webhook:
        """Raises `NotFound`, also for what is not of `owner`, if one is given."""
        found = self._load([webhook_id])
        if not found or owner not in (None, found[0].owner):
            raise not_found("webhook", webhook_id)
        return found[0]

    def page(
        self, *, after: str | None = None, limit: int = 20, order: Order = "desc", owner: str | None = None
    ) -> Page[Webhook]:
        """By creation, everybody's or those of `owner`. Raises `NotFound` where there is no webhook `after`."""
        try:
            return read_page(
                self._redis, index_of("webhooks", owner), self._load, after=after, limit=limit, order=order
            )
        except KeyError as error:
            raise not_found("webhook", str(after)) from error

    def delete(self, webhook_id: str) -> None:
        """Removes it with its deliveries. Raises `NotFound`."""
        if self._delete(args=[webhook_id]) == "missing":
            raise not_found("webhook", webhook_id)
        self._store.delete(f"webhooks/{webhook_id}")

    def ping(self, webhook_id: str) -> Delivery:
        """Queues a delivery of type ping, which is tried once. Raises `NotFound` and `QueueFull`."""
        delivery = f"dlv_{secrets.token_hex(12)}"
        answer = self._ping(args=[webhook_id, delivery, json.dumps({"webhook": webhook_id})])
        if answer == "missing":
            raise not_found("webhook", webhook_id)
        if answer == "full":
            raise QueueFull(f"too many deliveries to webhook {webhook_id} wait already; try again later", 60)
        return Delivery(id=delivery, type="ping", created_at=time.time(), status="pending", attempts=0)

    def deliveries(self, webhook_id: str) -> list[Delivery]:
        """The last 100 that are over, and up to 100 that wait, those that are due first; newest first."""
        found = self._deliveries(args=[webhook_id, _SHOWN])
        shown = [_delivery(*each) for each in found]
        return sorted(shown, key=lambda delivery: delivery.created_at, reverse=True)

    # Who sends them

    def claim(self, most: int, lease_seconds: float) -> list[Attempt]:
        """Deliveries that are due: nobody else gets them while the lease lasts, and who comes then, if not `end`ed.

        Of each webhook only a few are under way at a time, and webhooks take turns.
        """
        return [_attempt(*claimed) for claimed in self._claim(args=[most, lease_seconds])]

    def end(self, attempt: Attempt, outcome: Outcome) -> bool:
        """Says what came of an attempt; false where its lease had run out and another one was begun."""
        delay = -1 if outcome.retry_seconds is None else outcome.retry_seconds
        code = "" if outcome.status_code is None else outcome.status_code
        return bool(self._end(args=[attempt.id, attempt.number, outcome.status, code, outcome.error, delay]))

    def _load(self, ids: Sequence[str]) -> list[Webhook]:
        return [_shown(record, state) for record, state in self._records(ids)]

    def _records(self, ids: Sequence[str]) -> list[tuple[_Record, dict[str, str]]]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for webhook_id in ids:
                pipeline.get(f"flowpp:webhook:{webhook_id}")
                pipeline.hgetall(f"flowpp:webhook:{webhook_id}:state")
            answers = pipeline.execute()
        pairs = zip(answers[::2], answers[1::2], strict=True)
        return [(_Record.model_validate_json(record), state) for record, state in pairs if record]


def _shown(record: _Record, state: dict[str, str]) -> Webhook:
    reason = state.get("disabled_reason")
    return Webhook(
        **record.model_dump(exclude={"secret"}),
        status="disabled" if reason else "active",
        disabled_reason=reason,
        dropped=int(state.get("dropped", 0)),
    )


def _shown_once(record: _Record, state: dict[str, str]) -> CreatedWebhook:
    return CreatedWebhook(**_shown(record, state).model_dump(), secret=record.secret)


def _delivery(delivery_id: str, due: str | None, fields: list[str]) -> Delivery:
    known = dict(zip(fields[::2], fields[1::2], strict=True))
    values: dict[str, Any] = {name: value for name, value in known.items() if value and name in Delivery.model_fields}
    return Delivery.model_validate(values | {"id": delivery_id, "next_attempt_at": due})


def _attempt(delivery_id: str, number: int, type: str, created_at: str, data: str, record: str) -> Attempt:
    webhook = _Record.model_validate_json(record)
    timestamp = datetime.fromtimestamp(float(created_at), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = json.dumps({"type": type, "timestamp": timestamp, "data": json.loads(data)}, separators=(",", ":"))
    return Attempt(delivery_id, number, type, body, webhook.url, webhook.secret, webhook.id)
