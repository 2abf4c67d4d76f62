"""Supervision of a training process: its files, its end, and what an attempt takes over from the one before."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowpp import FlowPP
from flowpp.checkpoint import StoredFile, complete_checkpoint
from flowpp.data import build_image_set
from flowpp.memory import estimate, gib
from flowpp.plan import SURE
from flowpp.presets import resolve_model, resolve_training
from flowpp.run_directory import Result, RunDirectory
from flowpp.weights import write_checkpoint
from tests.waiting import LEASE_SECONDS, PATIENCE_SECONDS, until
from worker import child
from worker.attempt import held, prepare, say_process
from worker.datasets import Dataset
from worker.jobs import Job, JobError
from worker.requests import TrainingRequest
from worker.service import Service
from worker.settings import Settings
from worker.submission import submit_training
from worker.training import LOG, Reporter, Tail, killed_for_memory, outcome, train


@pytest.fixture
def job(service: Service, dataset: Dataset) -> Job:
    return claim_new(service, dataset)


def claim_new(service: Service, dataset: Dataset) -> Job:
    submit_training(service, TrainingRequest.model_validate({"dataset": dataset.id, "model": {"preset": "tiny"}}))
    return claim(service)


def claim(service: Service) -> Job:
    return service.jobs.claim("training", "a worker")[0]


def write(run: RunDirectory, step: int, **metrics: float) -> None:
    """Takes the run to a checkpoint at `step`, with a line of metrics for each step."""
    model = FlowPP(resolve_model("tiny", {}, (3, 8, 8)))
    rows = run.read_metrics()
    for taken in range(rows[-1]["step"] + 1 if rows else 1, step + 1):
        run.append_metrics([{"step": taken, "images_seen": 8 * taken, "train_bits_per_dim": 7.0}])
    tensors = {"model.safetensors": model.state_dict()}
    write_checkpoint(run.checkpoint(step), tensors, model=model.config, step=step, metrics=metrics)


def test_a_tail_reads_each_complete_line_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tail = Tail(path)
    assert tail.read() == []
    with path.open("ab", buffering=0) as file:
        file.write(b"one\ntwo\nthr")
        assert tail.read() == [b"one\n", b"two\n"]
        assert tail.read() == []
        file.write(b"ee\n")
    assert tail.read() == [b"three\n"]
    assert Tail(path).read() == []


@pytest.mark.parametrize(
    ("result", "status", "asked", "expected", "words"),
    [
        (Result(status="succeeded"), 0, False, "succeeded", None),
        (Result(status="stopped"), 0, True, "stopped", None),
        (Result(status="failed", code="nan_loss", message="at step 3"), 1, False, "failed", "at step 3"),
        (None, -9, False, "crashed", "ended by SIGKILL"),
        (None, -11, False, "crashed", "ended by SIGSEGV"),
        (None, -15, True, "stopped", None),
        (None, -9, True, "stopped", None),
        (None, 1, False, "crashed", "ended with status 1: the last line"),
        (None, 2, False, "failed", "ended with status 2: the last line"),
    ],
)
def test_how_a_training_process_ends_says_what_becomes_of_its_job(
    tmp_path: Path, result: Result | None, status: int, asked: bool, expected: str, words: str | None
) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / LOG).write_text("the first line\nthe last line\n")
    if result:
        run.write_result(result)
    became, error = outcome(run, status, asked)
    assert became == expected
    assert (error is None) == (words is None)
    if error is not None:
        assert words in error.message
        assert error.code == (result.code if result else "internal")


def test_what_appears_in_the_run_directory_is_told_once(service: Service, job: Job) -> None:
    run = prepare(service, job)[0]
    reporter = Reporter(service, job, run)
    write(run, 2)
    (run.path / LOG).write_text('{"step": 1}\nsomething to say\n')
    reporter.tell()
    reporter.tell()
    events = [event for event in service.events.page(job.id).data if event.type != "status"]
    assert [event.type for event in events] == ["metrics", "metrics", "log", "checkpoint"]
    assert [event.data.get("step", event.data.get("line")) for event in events] == [1, 2, "something to say", 2]
    progress = service.jobs.get(job.id).progress
    assert progress is not None
    assert (progress.step, progress.total_steps, progress.percent_done) == (2, 20, 10)


def test_the_store_keeps_the_newest_checkpoints_and_the_best(service: Service, job: Job) -> None:
    run = prepare(service, job)[0]
    reporter = Reporter(service, job, run)
    for step, score in ((1, 7.0), (2, 5.0), (3, 6.0), (4, 6.5), (5, 6.2)):
        write(run, step, validation_bits_per_dim=score)
        reporter.tell()
    assert [checkpoint.step for checkpoint in service.checkpoints.of_job(job.id)] == [2, 4, 5]
    assert len(list((Path(service.settings.store_url) / "checkpoints").iterdir())) == 3
    result = reporter.result()
    assert (result["step"], result["validation_bits_per_dim"]) == (5, 5.0)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_next_attempt_has_the_newest_checkpoint_and_the_metrics_up_to_it(
    service: Service, job: Job, elsewhere: bool
) -> None:
    run = prepare(service, job)[0]
    reporter = Reporter(service, job, run)
    write(run, 2)
    reporter.tell()
    run.append_metrics([{"step": 3, "images_seen": 24, "train_bits_per_dim": 6.0}])  # of a step after the checkpoint
    reporter.tell()
    service.jobs.end(job, "stopped")
    if elsewhere:  # on another machine there is only the store
        shutil.rmtree(service.run_directory(job.id))
    again, step = prepare(service, claim(service))
    assert step == 2
    assert again.path != run.path
    assert not run.path.exists()
    assert [path.name for path in again.checkpoints()] == ["step-00000002"]
    assert [row["step"] for row in again.read_metrics()] == [1, 2]
    assert again.config.model.model_dump(mode="json") == job.plan["model"]


def test_metrics_that_a_lost_attempt_could_not_tell_are_told_by_the_next(service: Service, job: Job) -> None:
    run = prepare(service, job)[0]
    reporter = Reporter(service, job, run)
    write(run, 2)
    reporter.tell()
    write(run, 4)
    service.jobs.end(job, "crashed")
    again = claim(service)
    Reporter(service, again, prepare(service, again)[0]).tell()
    assert [row["step"] for row in service.events.metrics(job.id)] == [1, 2, 3, 4]
    assert [checkpoint.step for checkpoint in service.checkpoints.of_job(job.id)] == [2, 4]


def test_the_next_attempt_ends_the_process_of_the_one_before(service: Service, job: Job) -> None:
    run = prepare(service, job)[0]
    with held(run) as lock:
        command = [sys.executable, "-c", "import time; time.sleep(100_000)"]
        process = child.start(command, run.path / LOG, pass_fds=[lock.fileno()])
        say_process(lock, process.pid)
    service.redis.zadd("flowpp:leases", {job.id: 0})
    service.jobs.reap()
    prepare(service, claim(service))
    assert process.wait(PATIENCE_SECONDS) == -9


def test_metrics_are_json_lines_as_the_library_writes_them(service: Service, job: Job) -> None:
    run = prepare(service, job)[0]
    reporter = Reporter(service, job, run)
    write(run, 1)
    reporter.tell()
    [row] = service.events.metrics(job.id)
    assert row == json.loads((run.path / "metrics.jsonl").read_text())


def test_a_checkpoint_whose_metrics_come_later_takes_the_place_of_the_one_without(service: Service, job: Job) -> None:
    run = prepare(service, job)[0]
    write(run, 2)
    Reporter(service, job, run).tell()
    [before] = service.checkpoints.of_job(job.id)
    complete_checkpoint(run.checkpoint(2), {"validation_bits_per_dim": 5.0}, [5.0] * 101, {})
    for _ in range(2):
        Reporter(service, job, run).tell()
    [after] = service.checkpoints.of_job(job.id)
    assert (before.metrics, after.metrics) == ({}, {"validation_bits_per_dim": 5.0})
    assert (before.validation_quantiles, after.validation_quantiles) == (None, [5.0] * 101)
    assert after.id != before.id
    assert not (Path(service.settings.store_url) / before.prefix).exists()


def test_artifacts_are_there_from_the_first_checkpoint_on(service: Service, job: Job) -> None:
    run = prepare(service, job)[0]
    reporter = Reporter(service, job, run)
    named = []
    for step in (2, 4, 6):
        write(run, step)
        run.samples(step).parent.mkdir(exist_ok=True)
        run.samples(step).write_bytes(b"a picture")
        reporter.tell()
        named.append(service.jobs.get(job.id).artifacts)
        files = service.store.manifest(named[-1]).files
        assert f"samples/step-{step:08d}.png" in files
        with service.store.open(named[-1], "metrics.jsonl") as file:
            assert file.read().count(b"\n") == step
    kept = sorted(path.name for path in (Path(service.settings.store_url) / "jobs" / job.id).iterdir())
    assert kept == ["attempt-1-4", "attempt-1-6"], "who reads those of a moment ago still can"
    reporter.delete_earlier_artifacts()
    assert not list((Path(service.settings.store_url) / "jobs" / job.id).iterdir())


@pytest.mark.parametrize("wish", ["pause", "cancel", "shutdown"])
def test_an_attempt_that_is_to_stop_while_it_copies_its_data_ends_at_once(
    service: Service, settings: Settings, tmp_path: Path, wish: str
) -> None:
    remote = settings.model_copy(update={"store": f"memory://{tmp_path.name}", "lease_seconds": LEASE_SECONDS})
    np.save(tmp_path / "images.npy", np.zeros((40, 8, 8, 3), np.uint8))
    with Service(remote) as service:
        job = claim_new(service, service.datasets.register(build_image_set(tmp_path / "images.npy", tmp_path / "set")))
        shutdown = threading.Event()
        copied = []

        def copy(source: Any, target: Any, check: Callable[[], None]) -> StoredFile:
            copied.append(source)
            ask = {"pause": service.jobs.pause, "cancel": service.jobs.cancel, "shutdown": lambda _: shutdown.set()}
            ask[wish](job.id)
            until(check, "it goes on")  # `check` raises after the lease's thread has read the wish

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("worker.artifacts._copy", copy)
            train(service, job, shutdown)
        assert len(copied) == 1
        ended = service.jobs.get(job.id)
        assert ended.status == {"pause": "paused", "cancel": "cancelled", "shutdown": "queued"}[wish]
        assert (ended.failures, ended.error) == (0, None)
        assert not list(service.settings.data_directory.rglob("images.npy")), "nothing half-copied stays"


def test_the_events_say_which_attempt_why_the_last_one_ended_and_where_it_goes_on(
    service: Service, dataset: Dataset
) -> None:
    job = claim_new(service, dataset)
    run = prepare(service, job)[0]
    write(run, 10)
    Reporter(service, job, run).tell()
    service.jobs.end(job, "crashed", error=JobError(code="internal", message="it was ended by SIGKILL"))
    again = claim(service)
    train(service, again, threading.Event())
    events = service.events.page(job.id, limit=1000).data
    said = [event.data.get("message", event.data.get("line")) for event in events if event.type in ("status", "log")]
    assert said[:5] == [
        None,
        "attempt 1 begins",
        "it was ended by SIGKILL; it is tried again after 1 of 2 failures",
        "attempt 2 begins; the one before ended: it was ended by SIGKILL",
        "attempt 2 goes on from step 10 of 20; the one before ended: it was ended by SIGKILL",
    ]


def test_a_job_says_how_it_was_planned_to_fit_the_memory_that_was_given(service: Service, dataset: Dataset) -> None:
    plain = {"compile": False}  # without kernels, so that it takes the same memory on every machine
    model, training = resolve_model("tiny", {"blocks": 24}, dataset.shape), resolve_training("tiny", plain)
    needed = estimate(model, training.model_copy(update={"micro_batch_size": 3})).at(3)
    recipe = plain | {"memory_gib": needed / SURE / 2**30, "steps": 2, "warmup_steps": 0}
    request = {"dataset": dataset.id, "model": {"preset": "tiny", "blocks": 24}, "training": recipe}
    submit_training(service, TrainingRequest.model_validate(request))
    job = claim(service)
    train(service, job, threading.Event())
    assert service.jobs.get(job.id).status == "succeeded"
    said = [event.data["line"] for event in service.events.page(job.id).data if event.type == "log"]
    plan = f"new weights; 3 images a forward pass: {gib(needed)} of {gib(needed / SURE)}"
    assert any(plan in line for line in said), said


def test_who_is_killed_for_memory_is_told_of_the_plan_that_the_run_had(service: Service, dataset: Dataset) -> None:
    submit_training(service, TrainingRequest.model_validate({"dataset": dataset.id, "model": {"preset": "tiny"}}))
    run, _ = prepare(service, claim(service))
    config = run.config
    assert config.training.micro_batch_size is None
    assert "memory, and its kernel killed the training process: 8 images a forward pass" in killed_for_memory(run)
    for step, had in ((1, {"micro_batch_size": 2}), (2, {"micro_batch_size": 3, "activation_checkpointing": True})):
        planned = config.training.model_copy(update={"activation_checkpointing": False, **had})
        tensors = {"model.safetensors": FlowPP(config.model).state_dict()}
        write_checkpoint(run.checkpoint(step), tensors, model=config.model, training=planned, step=step)
        needed = gib(estimate(config.model, planned).at(had["micro_batch_size"]))
        said = f"killed the training process: {had['micro_batch_size']} images a forward pass take about {needed}"
        assert said in killed_for_memory(run)


def test_failures_count_anew_once_an_attempt_stores_a_later_checkpoint_than_it_began_with(
    service: Service, job: Job
) -> None:
    service.redis.hset(f"flowpp:job:{job.id}", "max_attempts", 3)
    for step, failures in ((2, 1), (2, 2), (4, 1)):
        run, began_at = prepare(service, job)
        if step > began_at:
            write(run, step)
        Reporter(service, job, run, began_at).tell()
        service.jobs.end(job, "crashed", error=JobError(code="internal", message="it was ended by SIGKILL"))
        assert service.jobs.get(job.id).failures == failures
        job = claim(service)


def test_the_end_is_estimated_from_the_steps_of_this_attempt(service: Service, job: Job) -> None:
    def estimate() -> float | None:
        progress = service.jobs.get(job.id).progress
        assert progress is not None
        return progress.estimated_finish_at

    assert estimate() is None
    run, began_at = prepare(service, job)
    write(run, 2)
    service.jobs.end(job, "crashed", error=JobError(code="internal", message="before it could tell"))
    job = claim(service)
    run, began_at = prepare(service, job)
    reporter = Reporter(service, job, run, began_at)
    assert estimate() is None, "the attempt before took these steps"
    reporter.tell()
    told = []
    for step in (3, 4, 5):
        run.append_metrics([{"step": step, "images_seen": 8 * step, "train_bits_per_dim": 7.0}])
        told.append((time.time(), reporter.tell(), time.time()))
        if step == 3:
            assert estimate() is None
        time.sleep(0.1)
    found = estimate()
    assert found is not None
    (first_begun, _, first_ended), _, (begun, _, ended) = told
    least, most = (begun - first_ended) / 2, (ended - first_begun) / 2  # seconds a step; 15 steps are left
    assert begun + 15 * least - 0.001 <= found <= ended + 15 * most + 0.001


def test_a_diverged_training_is_warned_of_fails_as_such_and_its_model_is_from_before(
    service: Service, dataset: Dataset
) -> None:
    recipe = {"steps": 20, "learning_rate": 1.0, "warmup_steps": 5}
    request = {"dataset": dataset.id, "model": {"preset": "tiny"}, "training": recipe}
    submit_training(service, TrainingRequest.model_validate(request))
    job = claim(service)
    train(service, job, threading.Event())
    ended = service.jobs.get(job.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error.code == "diverged"
    assert "has not recovered" in ended.error.message
    events = service.events.page(job.id, limit=1_000).data
    warned = [event.data["message"] for event in events if event.type == "warning"]
    assert "training bits/dim stays above 8, which a uniform code costs, since step 6" in warned[0]
    logged = [event.data["line"] for event in events if event.type == "log"]
    assert any(warned[0] in line for line in logged)
    assert {checkpoint.step for checkpoint in service.checkpoints.of_job(job.id)} >= {20}
    assert service.checkpoints.resolve(job.id).id == (ended.result or {})["best_checkpoint"]


def test_the_store_keeps_the_last_checkpoint_of_before_a_divergence_as_the_jobs_model(
    service: Service, job: Job
) -> None:
    service.redis.hset(f"flowpp:job:{job.id}", "max_attempts", 3)
    run = prepare(service, job)[0]
    reporter = Reporter(service, job, run)
    for step in range(10, 90, 10):
        values = {"train_bits_per_dim": 6.0 if step <= 30 else 5e4}
        model = FlowPP(run.config.model)
        run.append_metrics([{"step": each, "images_seen": 8 * each, **values} for each in range(step - 9, step + 1)])
        tensors = {"model.safetensors": model.state_dict()}
        write_checkpoint(run.checkpoint(step), tensors, model=model.config, step=step, metrics=values)
        if step > 30:
            run.mark_diverged(30)
        reporter.tell()
        assert service.checkpoints.resolve(job.id).step == min(step, 30)
    assert [checkpoint.step for checkpoint in service.checkpoints.of_job(job.id)] == [30, 70, 80]


def test_what_the_worker_inherits_from_a_launcher_or_a_notebook_breaks_no_training(
    service: Service, job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("flowpp", "worker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the one of the current directory')")
    (tmp_path / "types.py").write_text("raise ImportError('the one of the current directory')")
    monkeypatch.chdir(tmp_path)
    for name, value in {
        **{"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"},
        **{"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "another"},
        **{"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": "/nonexistent"},
        **{"PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONINSPECT": "1", "LC_ALL": "C", "PYTHONUTF8": "0"},
    }.items():
        monkeypatch.setenv(name, value)
    train(service, job, threading.Event())
    ended = service.jobs.get(job.id)
    assert ended.status == "succeeded", (ended.error, service.events.page(job.id, limit=1_000).data)
    assert "training_curve.png" in service.store.manifest(ended.artifacts).files


def test_a_group_of_processes_trains_whatever_group_the_worker_is_started_in(
    service: Service, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "8", "RANK": "7", "PET_NPROC_PER_NODE": "8", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    recipe = {"steps": 2, "warmup_steps": 0, "num_processes": 2}
    request = {"dataset": dataset.id, "model": {"preset": "tiny"}, "training": recipe}
    submit_training(service, TrainingRequest.model_validate(request))
    job = claim(service)
    train(service, job, threading.Event())
    assert service.jobs.get(job.id).status == "succeeded", service.events.page(job.id, limit=1_000).data
