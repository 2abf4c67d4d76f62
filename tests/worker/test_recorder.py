"""The recorder: the store follows what Redis knows of jobs, and keeps nothing of those that are deleted."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_SECONDS, until
from tests.worker.conftest import Submit
from worker.artifacts import Together
from worker.garbage import collect
from worker.jobs import Progress
from worker.rebuilding import rebuild
from worker.recorder import Recorder, place
from worker.redis_server import RedisServer
from worker.service import Service


def records(service: Service, job_id: str) -> list[str]:
    return [file.name for file in service.store.listing(f"jobs/{job_id}")]


def statuses(service: Service, job_id: str) -> list[str]:
    """As the job's only record in the store has them."""
    (name,) = records(service, job_id)
    record = service.store.manifest(f"jobs/{job_id}/{name.partition('/')[0]}").record
    events = [json.loads(line) for line in record["events"].splitlines()]
    return [json.loads(data)["status"] for _, kind, data in events if kind == "status"]


def test_a_job_is_stored_once_a_change_and_the_record_before_it_is_deleted(service: Service, submit: Submit) -> None:
    recorder, job = Recorder(service), submit("sampling")
    assert recorder.record() == 1
    assert recorder.record() == 0
    assert statuses(service, job.id) == ["queued"]
    (claimed,) = service.jobs.claim("inference", "a")
    service.jobs.succeed([(claimed, {"num_samples": 1}, "", Progress.at(1, 1))])
    assert recorder.record() == 1
    assert statuses(service, job.id) == ["queued", "running", "succeeded"]


def test_who_answers_requests_leaves_jobs_to_others_for_a_while(service: Service, submit: Submit) -> None:
    began = time.monotonic()
    submit("sampling")
    assert Recorder(service, leave_seconds=3_600).record() == 0
    assert until(Recorder(service, leave_seconds=1).record) == 1
    assert time.monotonic() - began >= 1


def test_a_checkpoint_makes_the_record_be_written_again_and_metrics_alone_do_not(
    service: Service, submit: Submit
) -> None:
    recorder = Recorder(service)
    submit()
    (job,) = service.jobs.claim("training", "a")
    recorder.record()
    service.events.append(job, "metrics", {"step": 1})
    assert recorder.record() == 0
    service.events.append(job, "checkpoint", {"id": "ckpt_1", "step": 1, "metrics": {}})
    assert recorder.record() == 1
    (name,) = records(service, job.id)
    events = service.store.manifest(f"jobs/{job.id}/{name.partition('/')[0]}").record["events"]
    assert [json.loads(line)[1] for line in events.splitlines()] == ["status", "status", "metrics", "checkpoint"]


def test_a_change_while_a_job_is_stored_is_stored_next(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, job, put = Recorder(service), submit(), service.store.put_record

    def cancelled_meanwhile(*arguments: object) -> object:
        monkeypatch.undo()
        service.jobs.cancel(job.id)
        return put(*arguments)

    monkeypatch.setattr(service.store, "put_record", cancelled_meanwhile)
    recorder.record()
    assert statuses(service, job.id) == ["queued"]
    assert recorder.record() == 1
    assert statuses(service, job.id) == ["queued", "cancelled"]


def test_one_who_is_late_takes_nothing_newer_away(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, job, put = Recorder(service), submit(), service.store.put_record

    def overtaken(*arguments: object) -> object:
        monkeypatch.undo()
        service.jobs.cancel(job.id)
        assert Recorder(service).record() == 1
        return put(*arguments)

    monkeypatch.setattr(service.store, "put_record", overtaken)
    recorder.record()
    assert statuses(service, job.id) == ["queued", "cancelled"]
    assert recorder.record() == 0


def test_a_job_deleted_while_it_is_stored_does_not_come_back(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, job, put = Recorder(service), submit(), service.store.put_record

    def deleted_meanwhile(*arguments: object) -> object:
        monkeypatch.undo()
        assert service.delete_job(job.id)
        return put(*arguments)

    monkeypatch.setattr(service.store, "put_record", deleted_meanwhile)
    recorder.record()
    assert records(service, job.id) == []
    recorder.record()
    assert service.redis.zcard("flowpp:changed") == 0


@pytest.mark.parametrize("others", [1, 30])
def test_a_job_deleted_before_what_is_written_of_it_is_on_disk_does_not_come_back(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    recorder, job, finish = Recorder(service), submit(), Together.finish
    kept = [submit() for _ in range(others)]

    def deleted_meanwhile(together: Together) -> object:
        monkeypatch.undo()
        assert service.delete_job(job.id)
        return finish(together)

    monkeypatch.setattr(Together, "finish", deleted_meanwhile)
    recorder.record()
    assert records(service, job.id) == []
    assert all(statuses(service, other.id) == ["queued"] for other in kept)
    recorder.record()
    assert service.redis.zcard("flowpp:changed") == 0


def test_what_a_deletion_that_was_killed_has_left_is_deleted(service: Service, submit: Submit) -> None:
    recorder, job = Recorder(service), submit()
    recorder.record()
    assert service.jobs.delete(job.id)  # and the process is killed before it deletes in the store
    assert records(service, job.id) != []
    recorder.record()
    assert records(service, job.id) == []


def test_a_job_that_cannot_be_stored_stays_marked_and_the_others_are_stored(service: Service, submit: Submit) -> None:
    recorder, hopeless, other = Recorder(service), submit(), submit()
    assert service.store.directory is not None
    folder = service.store.directory / "jobs" / hopeless.id
    folder.parent.mkdir()
    folder.write_text("no folder")
    with pytest.raises(OSError, match=hopeless.id):
        recorder.record()
    assert statuses(service, other.id) == ["queued"]
    folder.unlink()
    assert recorder.record() == 1
    assert statuses(service, hopeless.id) == ["queued"]


def test_many_recorders_store_each_change(service: Service, submit: Submit) -> None:
    jobs = [submit() for _ in range(20)]
    ready = threading.Barrier(4)

    def work(number: int) -> None:
        recorder = Recorder(service)
        ready.wait()
        for job in jobs[number::4]:
            service.jobs.cancel(job.id)
            recorder.record()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    Recorder(service).record()
    for job in jobs:
        assert statuses(service, job.id)[-1] == "cancelled"
        (changed,) = service.redis.hmget(f"flowpp:job:{job.id}", "changed")
        assert service.store.manifest(place(job.id, changed))


def test_what_changed_last_is_stored_before_a_recorder_ends(service: Service, submit: Submit) -> None:
    with Recorder(service, leave_seconds=60):
        job = submit("sampling")
        service.jobs.cancel(job.id)
    assert statuses(service, job.id) == ["queued", "cancelled"]
    assert service.redis.zcard("flowpp:changed") == 0


def test_a_recorder_ends_in_time_where_the_store_does_not_answer(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr("worker.recorder.LAST_SECONDS", 0.2)
    monkeypatch.setattr(service.store, "put_record", lambda *_: answers.wait(PATIENCE_SECONDS))
    with Recorder(service, leave_seconds=60) as recorder:
        submit()
        start = time.monotonic()
    assert time.monotonic() - start < PATIENCE_SECONDS, "it has waited for the store"
    answers.set()
    recorder._thread.join()


def test_a_recorder_ends_where_the_store_or_redis_is_away(
    service: Service, submit: Submit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: object) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(service.store, "put_record", fails)
    with Recorder(service):
        submit()
    assert service.redis.zcard("flowpp:changed") == 1, "it is left to the next"
    with RedisServer(tmp_path / "redis") as server, ExitStack() as ends:
        away = ends.enter_context(Service(service.settings.model_copy(update={"redis_url": server.url})))
        ends.enter_context(Recorder(away))
        server.stop()


def test_many_events_are_stored_whole_beside_jobs_of_few(service: Service, submit: Submit) -> None:
    submit(), submit()
    (job,) = service.jobs.claim("training", "a")
    for step in range(250):
        service.events.append(job, "metrics", {"step": step})
    assert Recorder(service).record() == 2
    (name,) = records(service, job.id)
    events = service.store.manifest(f"jobs/{job.id}/{name}").record["events"]
    assert len(events.splitlines()) == 252


def test_records_of_older_versions_are_read_and_give_way_to_newer_ones(service: Service, submit: Submit) -> None:
    """They were directories."""
    recorder, old, newer = Recorder(service), submit("sampling"), submit("sampling")
    recorder.record()
    for job in (old, newer):
        (changed,) = service.redis.hmget(f"flowpp:job:{job.id}", "changed")
        record = service.store.manifest(place(job.id, changed)).record
        service.store.delete(place(job.id, changed))
        service.store.put_record(f"jobs/{job.id}/record-{changed}", record)
    assert collect(service, grace_seconds=-1) == []
    service.jobs.cancel(newer.id)
    recorder.record()
    service.redis.flushall()
    assert rebuild(service).jobs == 2
    assert service.jobs.get(old.id).status == "queued"
    assert service.jobs.get(newer.id).status == "cancelled"
    (garbage,) = collect(service, grace_seconds=-1)
    assert garbage.name.startswith(f"jobs/{newer.id}/record-")
    assert rebuild_anew(service) == {old.id: "queued", newer.id: "cancelled"}


def rebuild_anew(service: Service) -> dict[str, str]:
    """The statuses of the jobs that the store knows."""
    service.redis.flushall()
    rebuild(service)
    return {job.id: job.status for job in service.jobs.page().data}


def test_a_record_is_one_file_and_none_is_left_of_a_deleted_job(service: Service, submit: Submit) -> None:
    recorder, job = Recorder(service), submit("sampling")
    service.jobs.cancel(job.id)
    recorder.record()
    (changed,) = service.redis.hmget(f"flowpp:job:{job.id}", "changed")
    assert records(service, job.id) == [f"record-{changed}.json"]
    assert service.delete_job(job.id)
    recorder.record()
    assert service.store.listing("jobs") == []
    assert rebuild_anew(service) == {}
