"""Webhooks in Redis: an event becomes a delivery with its transition; each is claimed by one, under a lease."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.waiting import until
from tests.worker.conftest import Submit
from worker import transitions
from worker.connection import redis_time
from worker.jobs import Job, JobError
from worker.refusals import NotFound, OverQuota, QueueFull
from worker.service import Service
from worker.webhooks import EVENTS, MAX_WEBHOOKS, Attempt, CreatedWebhook, NewWebhook, Outcome

URL = "https://example.com/hook"
LEASE = 0.3


@pytest.fixture
def webhook(service: Service) -> CreatedWebhook:
    return service.webhooks.create(NewWebhook(url=URL))


def claim(service: Service, most: int = 100, lease: float = 60) -> list[Attempt]:
    return service.webhooks.claim(most, lease)


def drain(service: Service) -> list[dict]:
    """The bodies of all that is due, each delivered."""
    bodies = []
    while attempts := claim(service):
        for attempt in attempts:
            assert service.webhooks.end(attempt, Outcome("delivered", 200))
            bodies.append(json.loads(attempt.body))
    return bodies


def run(service: Service, submit: Submit, **given: str) -> Job:
    submit(**given)
    (job,) = service.jobs.claim("training", "worker")
    return job


def test_each_transition_is_a_delivery_with_what_the_job_then_was(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    job = run(service, submit, metadata={"name": "Zoë", "n": "1.0"})
    service.events.append(job, "metrics", {"step": 1})
    event = service.events.append(
        job, "checkpoint", {"id": "ckpt_1", "step": 1, "metrics": {"bits": 3.123456789012345}}
    )
    service.jobs.end(job, "succeeded", result={"bits_per_dim": 3.123456789012345, "per_image": []})
    bodies = drain(service)
    assert [body["type"] for body in bodies] == ["job.queued", "job.running", "job.checkpoint", "job.succeeded"]
    checkpoint, last = bodies[2]["data"], bodies[3]["data"]
    assert checkpoint["checkpoint"] == {"id": "ckpt_1", "step": 1, "metrics": {"bits": 3.123456789012345}}
    assert checkpoint["event_id"] == event
    assert last == {
        "id": job.id,
        "object": "job",
        "type": "training",
        "status": "succeeded",
        "attempt": 1,
        "metadata": {"name": "Zoë", "n": "1.0"},
        "error": None,
        "result": {"bits_per_dim": 3.123456789012345, "per_image": []},
        "event_id": service.events.page(job.id).data[-1].id,
    }
    assert all(body["timestamp"].endswith("Z") and len(body["timestamp"]) == 24 for body in bodies)


def test_a_failed_job_says_why_and_a_large_result_is_left_out(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    job = run(service, submit)
    service.jobs.end(job, "failed", error=JobError(code="nan_loss", message='it is "not" finite'))
    assert drain(service)[-1]["data"]["error"] == {"code": "nan_loss", "message": 'it is "not" finite'}
    job = run(service, submit)
    service.jobs.end(job, "succeeded", result={"images": "x" * 5_000})
    last = drain(service)[-1]
    assert (last["type"], last["data"]["result"]) == ("job.succeeded", None)


def test_what_a_job_only_passes_through_is_not_told(service: Service, submit: Submit, webhook: CreatedWebhook) -> None:
    job = run(service, submit)
    service.jobs.pause(job.id)
    service.jobs.end(job, "stopped")
    service.jobs.resume(job.id)
    service.jobs.cancel(job.id)
    types = [body["type"] for body in drain(service)]
    assert types == ["job.queued", "job.running", "job.paused", "job.queued", "job.cancelled"]


def test_a_webhook_gets_the_events_it_wants_of_its_owners_jobs(service: Service, submit: Submit) -> None:
    chosen = service.webhooks.create(NewWebhook(url=URL, events=("job.cancelled",)), "alice")
    both = service.webhooks.create(NewWebhook(url=URL), "alice")
    job = submit(owner="alice")
    service.jobs.cancel(submit(owner="bob").id)
    service.jobs.cancel(job.id)
    taken = claim(service)
    assert {(attempt.webhook, attempt.type) for attempt in taken} == {
        (chosen.id, "job.cancelled"),
        (both.id, "job.queued"),
        (both.id, "job.cancelled"),
    }
    assert all(job.id in attempt.body for attempt in taken)
    assert len({attempt.id for attempt in taken}) == 3


def test_a_delivery_of_a_job_that_is_deleted_meanwhile_is_whole(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    job = submit()
    service.jobs.delete(job.id)
    assert [body["data"]["status"] for body in drain(service)] == ["queued", "cancelled"]


def test_a_delivery_is_claimed_by_one_until_its_lease_runs_out(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    submit()
    began = redis_time(service.redis)
    (first,) = claim(service, lease=LEASE)
    (second,) = until(lambda: claim(service))
    assert redis_time(service.redis) >= began + LEASE, "two had it at a time"
    assert (second.id, second.body, second.number) == (first.id, first.body, 2)
    assert not service.webhooks.end(first, Outcome("failed", 500, "late")), "it has lost the delivery"
    assert service.webhooks.end(second, Outcome("delivered", 204))
    assert not service.webhooks.end(second, Outcome("failed", 500, "twice"))
    (shown,) = service.webhooks.deliveries(webhook.id)
    assert (shown.status, shown.attempts, shown.status_code, shown.error) == ("delivered", 2, 204, None)
    assert shown.next_attempt_at is None


def test_what_failed_is_due_again_when_its_outcome_says(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    submit()
    (attempt,) = claim(service)
    began = redis_time(service.redis)
    service.webhooks.end(attempt, Outcome("failed", 500, "it answered 500", LEASE))
    ended = redis_time(service.redis)
    (shown,) = service.webhooks.deliveries(webhook.id)
    assert (shown.status, shown.attempts, shown.status_code, shown.error) == ("pending", 1, 500, "it answered 500")
    assert shown.next_attempt_at is not None
    assert began <= shown.next_attempt_at - LEASE <= ended
    (attempt,) = until(lambda: claim(service))
    assert redis_time(service.redis) >= began + LEASE, "it was tried too soon"
    service.webhooks.end(attempt, Outcome("failed", None, "no answer"))
    (shown,) = service.webhooks.deliveries(webhook.id)
    assert (shown.status, shown.attempts, shown.status_code, shown.error) == ("dead", 2, None, "no answer")


def test_what_is_shown_of_a_delivery_is_of_one_moment(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    def fail_one_after_another() -> None:
        for _ in range(60):
            submit()
            (attempt,) = claim(service, lease=15)
            service.webhooks.end(attempt, Outcome("failed", 500, "it answered 500", 1_000))

    with ThreadPoolExecutor(1) as other:
        failing = other.submit(fail_one_after_another)
        while not failing.done():
            for shown in service.webhooks.deliveries(webhook.id):
                assert shown.next_attempt_at is not None
                if shown.error:
                    assert shown.last_attempt_at is not None
                    assert shown.next_attempt_at - shown.last_attempt_at >= 1_000
        failing.result()
    assert len(service.webhooks.deliveries(webhook.id)) == 60


def test_webhooks_take_turns_and_none_has_more_than_two_under_way(service: Service, submit: Submit) -> None:
    slow, quick = (service.webhooks.create(NewWebhook(url=URL)) for _ in range(2))
    for _ in range(10):
        submit()
    service.redis.zadd("flowpp:deliveries", {slow.id: 1})  # it has waited longest
    taken = [attempt.webhook for attempt in claim(service)]
    assert sorted(taken) == sorted([slow.id, slow.id, quick.id, quick.id])
    assert claim(service) == []
    assert service.redis.zrangebyscore("flowpp:deliveries", "-inf", time.time() + 1) == [], "nobody looks in vain"


def test_one_with_many_that_are_due_does_not_hold_up_another(service: Service, submit: Submit) -> None:
    busy = service.webhooks.create(NewWebhook(url=URL, events=("job.queued",)))
    for _ in range(10):
        submit()
    other = service.webhooks.create(NewWebhook(url=URL, events=("job.queued",)))
    submit()
    (first,) = claim(service, most=1)
    (second,) = claim(service, most=1)
    assert (first.webhook, second.webhook) == (busy.id, other.id)


def test_an_endpoint_that_is_gone_disables_the_webhook(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    for _ in range(3):
        submit()
    gone, under_way = claim(service)
    service.webhooks.end(gone, Outcome("gone", 410, "it answered 410 Gone"))
    shown = service.webhooks.get(webhook.id)
    assert (shown.status, shown.disabled_reason) == ("disabled", "its endpoint answered 410 Gone")
    assert {delivery.status for delivery in service.webhooks.deliveries(webhook.id)} == {"dead"}
    assert not service.webhooks.end(under_way, Outcome("delivered", 200))
    submit()
    assert claim(service) == []


def test_a_ping_that_arrives_makes_a_disabled_webhook_active_again(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    submit()
    (attempt,) = claim(service)
    service.webhooks.end(attempt, Outcome("gone", 410, "it answered 410 Gone"))
    delivery = service.webhooks.ping(webhook.id)
    (ping,) = claim(service)
    assert (ping.id, ping.type, json.loads(ping.body)["data"]) == (delivery.id, "ping", {"webhook": webhook.id})
    service.webhooks.end(ping, Outcome("delivered", 200))
    assert service.webhooks.get(webhook.id).status == "active"
    submit()
    assert len(claim(service)) == 1


@pytest.mark.parametrize(("days", "status"), [(4.9, "active"), (5.1, "disabled")])
def test_five_days_of_failures_alone_disable_a_webhook(
    service: Service, submit: Submit, webhook: CreatedWebhook, days: float, status: str
) -> None:
    service.redis.hset(f"flowpp:webhook:{webhook.id}:state", "failing_since", time.time() - 86_400 * days)
    submit()
    submit()
    again, last = claim(service)
    service.webhooks.end(again, Outcome("failed", 500, "it answered 500", 0))
    assert service.webhooks.get(webhook.id).status == "active", "there are attempts left"
    service.webhooks.end(last, Outcome("failed", 500, "it answered 500"))
    assert service.webhooks.get(webhook.id).status == status


def test_a_success_among_failures_starts_the_count_anew(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    service.redis.hset(f"flowpp:webhook:{webhook.id}:state", "failing_since", time.time() - 86_400 * 6)
    submit()
    submit()
    good, bad = claim(service)
    service.webhooks.end(good, Outcome("delivered", 200))
    service.webhooks.end(bad, Outcome("failed", 500, "it answered 500"))
    assert service.webhooks.get(webhook.id).status == "active"


def test_only_so_many_deliveries_wait_and_the_rest_is_counted(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(transitions._WEBHOOK_LIMITS, "MAX_WAITING", 3)
    with Service(service.settings) as limited:
        webhook = limited.webhooks.create(NewWebhook(url=URL))
        for _ in range(5):
            Submit(limited)()
        assert len(limited.webhooks.deliveries(webhook.id)) == 3
        assert limited.webhooks.get(webhook.id).dropped == 2
        with pytest.raises(QueueFull, match="too many deliveries"):
            limited.webhooks.ping(webhook.id)
        assert len(limited.jobs.waiting("training")) == 5, "jobs go on"


def test_the_last_hundred_that_are_over_are_shown_and_no_more_is_kept(
    service: Service, submit: Submit, webhook: CreatedWebhook
) -> None:
    jobs = [submit() for _ in range(105)]
    assert len(service.webhooks.deliveries(webhook.id)) == 100
    drain(service)
    shown = service.webhooks.deliveries(webhook.id)
    assert len(shown) == 100
    assert [delivery.created_at for delivery in shown] == sorted((d.created_at for d in shown), reverse=True)
    kept = service.redis.keys("flowpp:delivery:*")
    assert len(kept) == 100
    assert not any(jobs[-1].id in str(service.redis.hgetall(key)) for key in kept), "their content is forgotten"


def test_deleting_a_webhook_leaves_nothing_of_it(service: Service, submit: Submit) -> None:
    before = set(service.redis.keys("*"))
    webhook = service.webhooks.create(NewWebhook(url=URL), "alice")
    for _ in range(4):
        submit(owner="alice")
    pending = claim(service)
    service.webhooks.end(pending[0], Outcome("delivered", 200))
    service.webhooks.delete(webhook.id)
    assert not [key for key in set(service.redis.keys("*")) - before if "webhook" in key or "deliver" in key]
    assert not list(Path(service.settings.store_url).rglob(f"*{webhook.id}*"))
    assert not service.webhooks.end(pending[1], Outcome("failed", 500, "late", 0))
    assert service.redis.keys("flowpp:deliver*") == []
    for refused in (service.webhooks.get, service.webhooks.delete, service.webhooks.ping, service.webhooks.created):
        with pytest.raises(NotFound, match="there is no webhook"):
            refused(webhook.id)


def test_an_owner_has_so_many_webhooks(service: Service) -> None:
    for _ in range(MAX_WEBHOOKS):
        service.webhooks.create(NewWebhook(url=URL), "alice")
    with pytest.raises(OverQuota, match="alice has 20 webhooks"):
        service.webhooks.create(NewWebhook(url=URL), "alice")
    service.webhooks.create(NewWebhook(url=URL), "bob")
    assert len(list(Path(service.settings.store_url, "webhooks").iterdir())) == MAX_WEBHOOKS + 1


def test_the_store_has_what_a_new_redis_server_needs(service: Service, submit: Submit) -> None:
    webhook = service.webhooks.create(NewWebhook(url=URL, events=("job.queued",)), "alice")
    record = service.store.manifest(f"webhooks/{webhook.id}").record
    service.redis.flushall()
    assert service.webhooks.page().data == []
    service.webhooks._scripts.register("webhook", record["id"], json.dumps(record))
    assert service.webhooks.created(webhook.id) == webhook
    submit(owner="alice")
    (attempt,) = claim(service)
    assert (attempt.webhook, attempt.secret) == (webhook.id, webhook.secret)


def test_events_are_told_in_the_models_order_whatever_order_they_are_asked_in(service: Service) -> None:
    webhook = service.webhooks.create(NewWebhook(url=URL, events=("job.failed", "job.queued", "job.failed")))
    assert webhook.events == ("job.queued", "job.failed")
    assert service.webhooks.create(NewWebhook(url=URL)).events == EVENTS
