"""Events of a job: each once, in order, replayed from anywhere, to the end."""

import asyncio
import json

import pytest

from tests.waiting import PATIENCE_SECONDS
from tests.worker.conftest import Submit
from worker.events import Event
from worker.jobs import Job
from worker.refusals import Invalid, NotFound
from worker.service import Service


@pytest.fixture
def job(service: Service, submit: Submit) -> Job:
    submit()
    return service.jobs.claim("training", "a worker")[0]


def told(events: list[Event]) -> list[object]:
    return [event.data.get("status", event.data.get("step")) for event in events]


def test_a_page_begins_behind_any_event(service: Service, job: Job) -> None:
    for step in range(5):
        service.events.append(job, "metrics", {"step": step})
    everything = service.events.page(job.id).data
    assert told(everything) == ["queued", "running", 0, 1, 2, 3, 4]
    for index, event in enumerate(everything):
        assert service.events.page(job.id, after=event.id).data == everything[index + 1 :]
    page = service.events.page(job.id, limit=3)
    assert (told(page.data), page.has_more) == (["queued", "running", 0], True)
    assert not service.events.page(job.id, limit=7).has_more


def test_what_is_no_event_id_is_refused(service: Service, job: Job) -> None:
    for wrong in ("", "x", "1", "-", "+", "1-1-1", "9" * 30 + "-0"):
        with pytest.raises(Invalid) as caught:
            service.events.page(job.id, after=wrong)
        assert caught.value.field == "after"


def test_events_of_no_job_are_not_found(service: Service) -> None:
    with pytest.raises(NotFound):
        service.events.page("job_nowhere")
    with pytest.raises(NotFound):
        asyncio.run(follow(service, "job_nowhere"))


async def follow(service: Service, job_id: str, after: str | None = None) -> list[Event]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [event async for event in service.events.follow(job_id, after)]


def test_a_follower_hears_what_was_and_what_comes_to_the_end(service: Service, job: Job) -> None:
    service.events.append(job, "metrics", {"step": 1})

    async def work() -> None:
        for step in (2, 3):
            await asyncio.sleep(0.05)
            service.events.append(job, "metrics", {"step": step})
        service.jobs.end(job, "succeeded")

    async def both() -> list[Event]:
        events, _ = await asyncio.gather(follow(service, job.id), work())
        return events

    events = asyncio.run(both())
    assert told(events) == ["queued", "running", 1, 2, 3, "succeeded"]
    assert [event.terminal for event in events] == [False] * 5 + [True]
    assert asyncio.run(follow(service, job.id, events[3].id)) == events[4:]
    assert asyncio.run(follow(service, job.id, events[-1].id)) == []


def test_following_ends_when_the_job_is_deleted_meanwhile(
    service: Service, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.events._BLOCK_MILLISECONDS", 200)

    async def both() -> list[Event]:
        following = asyncio.create_task(follow(service, job.id, service.events.page(job.id).data[-1].id))
        while not service.redis.info("clients")["blocked_clients"]:  # it has begun to follow
            await asyncio.sleep(0.02)
        service.redis.delete(f"flowpp:job:{job.id}", f"flowpp:job:{job.id}:events")
        return await following

    assert asyncio.run(both()) == []


def test_metrics_that_an_interrupted_attempt_told_are_there_once(service: Service, job: Job) -> None:
    for step, value in ((1, 8.0), (2, 7.0), (3, 6.0), (4, 5.0), (3, 6.5), (4, 5.5), (5, 4.5)):
        service.events.append(job, "metrics", {"step": step, "train_bits_per_dim": value})
    rows = [(row["step"], row["train_bits_per_dim"]) for row in service.events.metrics(job.id)]
    assert rows == [(1, 8.0), (2, 7.0), (3, 6.5), (4, 5.5), (5, 4.5)]


def test_the_few_events_of_a_type_are_found_among_thousands_in_both_orders(service: Service, submit: Submit) -> None:
    submit()
    (job,) = service.jobs.claim("training", "a worker")
    with service.redis.pipeline(transaction=False) as pipeline:
        for number in range(5_000):
            kind = "log" if number in (0, 1_996, 1_997, 1_998, 4_999) else "metrics"  # the stream begins with two more
            pipeline.xadd(f"flowpp:job:{job.id}:events", {"type": kind, "data": json.dumps({"line": number})})
        pipeline.execute()
    expected = [0, 1_996, 1_997, 1_998, 4_999]
    for order, lines in (("asc", expected), ("desc", expected[::-1])):
        assert [event.data["line"] for event in service.events.page(job.id, order=order, types=["log"]).data] == lines
        seen: list[Event] = []
        more = True
        while more:
            after = seen[-1].id if seen else None
            page = service.events.page(job.id, after, 2, order=order, types=["log"])
            seen += page.data
            more = page.has_more
        assert [event.data["line"] for event in seen] == lines
