"""The inference worker: batches on warm models, each job with its own answer, none lost."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from flowpp import FlowPP, tracing
from flowpp.likelihood import likelihood
from flowpp.presets import resolve_model
from tests.collector import collecting
from tests.waiting import PATIENCE_SECONDS
from worker.batches import Batch, next_batch
from worker.inference import Inference
from worker.jobs import Job, Progress
from worker.models import Checkpoint
from worker.requests import LikelihoodRequest, SamplingRequest
from worker.service import Service
from worker.submission import Terms, prepare_likelihood, prepare_sampling, submit_one
from worker.warm import WarmModels
from worker.work import MOST_IN_RECORD, LikelihoodWork, Work


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` model for images of 8 x 8, initialized on random ones."""
    import torch

    model = FlowPP(resolve_model("tiny", {}, (3, 8, 8)))
    generator = torch.Generator().manual_seed(0)
    model.initialize(torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=generator))
    path = tmp_path_factory.mktemp("model") / "saved"
    model.save(path)
    return path


@pytest.fixture
def checkpoint(service: Service, saved: Path) -> Checkpoint:
    return service.checkpoints.register(saved)


@pytest.fixture
def worker(service: Service) -> Inference:
    return Inference(service, "a worker", threading.Event())


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), np.uint8)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches of images whose likelihood was computed."""
    sizes: list[int] = []
    compute = LikelihoodWork.compute

    def counted(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        sizes.append(len(rows))
        return compute(model, rows, batch_size)

    monkeypatch.setattr(LikelihoodWork, "compute", staticmethod(counted))
    return sizes


def score(service: Service, checkpoint: Checkpoint, n: int, seed: int = 0, importance_samples: int = 1) -> Job:
    request = LikelihoodRequest(model=checkpoint.id, seed=seed, importance_samples=importance_samples)
    return submit_one(service, prepare_likelihood(service, request, images(n, seed)))


def test_requests_for_one_model_share_a_batch_and_get_their_own_answers(
    service: Service, checkpoint: Checkpoint, saved: Path, worker: Inference, batches: list[int]
) -> None:
    jobs = [score(service, checkpoint, n, seed) for seed, n in enumerate((1, 3, 2))]
    worker.drain()
    assert batches == [6]
    model = FlowPP.load(saved)
    for seed, job in enumerate(jobs):
        result = service.jobs.get(job.id).result
        assert result is not None
        [expected] = likelihood(model, images(result["num_images"], seed), seed=seed)
        found = [row["log_likelihood"] for row in result["images"]]
        np.testing.assert_allclose(found, expected[:, 0], rtol=1e-6)
    assert service.redis.zcard("flowpp:leases") == 0


def test_a_request_larger_than_a_batch_is_computed_in_several(
    service: Service, checkpoint: Checkpoint, worker: Inference, batches: list[int]
) -> None:
    job = score(service, checkpoint, 40, importance_samples=4)
    worker.drain()
    assert batches == [16, 16, 8]
    assert service.jobs.get(job.id).status == "succeeded"
    progress = service.jobs.get(job.id).progress
    assert progress is not None
    assert progress.percent_done == 100


def test_the_end_of_a_request_of_several_batches_is_estimated(
    service: Service, checkpoint: Checkpoint, worker: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = score(service, checkpoint, 40, importance_samples=4)
    compute, set_progress, told = LikelihoodWork.compute, service.jobs.set_progress, []

    def slowly(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        time.sleep(0.1)
        return compute(model, rows, batch_size)

    def noted(job: Job, progress: Progress) -> None:
        set_progress(job, progress)
        told.append((service.jobs.get(job.id).progress, time.time()))

    monkeypatch.setattr(LikelihoodWork, "compute", staticmethod(slowly))
    monkeypatch.setattr(service.jobs, "set_progress", noted)
    started = time.time()
    worker.drain()
    # two batches are computed at a time, so the last and smallest can end before the second one
    assert [progress.step for progress, _ in told] in ([16, 32], [16, 24])
    for progress, at in told:
        left = (at - started) / progress.step * (40 - progress.step)  # by the pace that the test has seen
        assert started + 0.1 < progress.estimated_finish_at <= at + left + 0.001
    ended = service.jobs.get(job.id).progress
    assert ended is not None
    assert (ended.percent_done, ended.estimated_finish_at) == (100, None)


def test_two_batches_are_computed_at_a_time(
    service: Service, checkpoint: Checkpoint, worker: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(service, checkpoint, 128)
    compute, both = LikelihoodWork.compute, threading.Barrier(2, timeout=PATIENCE_SECONDS)

    def together(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        both.wait()
        return compute(model, rows, batch_size)

    monkeypatch.setattr(LikelihoodWork, "compute", staticmethod(together))
    worker.drain()
    assert [job.status for job in service.jobs.page().data] == ["succeeded"]


def shares(works: Sequence[Work], batch: Batch | None) -> list[tuple[int, int]]:
    """Rows of a batch, each by the place of its work among `works` and its index there."""
    return [(list(works).index(work), index) for work, index in batch.rows] if batch else []


def test_a_batch_takes_what_waits_in_turns_and_the_next_one_the_rest(service: Service, checkpoint: Checkpoint) -> None:
    for seed, n in enumerate((6, 2, 3)):
        score(service, checkpoint, n, seed)
    works = [LikelihoodWork(service, job) for job in service.jobs.claim("inference", "a worker", 64)]
    first = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (2, 2)]
    assert [shares(works, next_batch(works, 64, 8)) for _ in range(3)] == [first, [(0, 3), (0, 4), (0, 5)], []]


def test_batches_are_small_while_somebody_may_wait(service: Service, checkpoint: Checkpoint) -> None:
    score(service, checkpoint, 300)
    works = [LikelihoodWork(service, job) for job in service.jobs.claim("inference", "a", 64, large=64, larges=1)]
    assert shares(works, next_batch(works, 64, 8)) == [(0, index) for index in range(64)]
    score(service, checkpoint, 1)
    works += [LikelihoodWork(service, job) for job in service.jobs.claim("inference", "a worker")]
    assert shares(works, next_batch(works, 64, 8)) == [(0, 64), (1, 0), *((0, index) for index in range(65, 71))]
    assert len(shares(works, next_batch(works, 64, 8))) == 64


def test_a_small_request_does_not_wait_for_the_end_of_a_large_one(
    service: Service, checkpoint: Checkpoint, worker: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = score(service, checkpoint, 300)
    compute, sent = LikelihoodWork.compute, []

    def meanwhile(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        if not sent:
            sent.append(score(service, checkpoint, 1, seed=1))
        return compute(model, rows, batch_size)

    monkeypatch.setattr(LikelihoodWork, "compute", staticmethod(meanwhile))
    worker.drain()
    first, second = service.jobs.get(sent[0].id), service.jobs.get(large.id)
    assert first.status == second.status == "succeeded"
    assert first.finished_at is not None
    assert second.finished_at is not None
    assert first.finished_at < second.finished_at


def test_many_large_requests_leave_room_for_small_ones_and_for_other_workers(
    service: Service, checkpoint: Checkpoint
) -> None:
    larges = [score(service, checkpoint, 100, seed) for seed in range(3)]
    small = score(service, checkpoint, 1, seed=9)
    worker = Inference(service, "a worker", threading.Event())
    held = worker._claim([])
    assert [job.id for job in held] == [larges[0].id, larges[1].id, small.id]
    assert [job.id for job in Inference(service, "another", threading.Event())._claim([])] == [larges[2].id]


def test_a_worker_that_looks_by_itself_is_rung_no_bell(service: Service, checkpoint: Checkpoint) -> None:
    def bells() -> int:
        return int(service.redis.llen("flowpp-inference"))

    score(service, checkpoint, 1)
    assert bells() == 1, "nobody looks yet"
    assert len(service.jobs.claim("inference", "a worker", 64, awake_seconds=30)) == 1
    score(service, checkpoint, 1)
    assert bells() == 1
    assert not service.jobs.sleep("inference", "a worker"), "one came since"
    service.jobs.claim("inference", "a worker", 64, awake_seconds=30)
    assert service.jobs.sleep("inference", "a worker")
    score(service, checkpoint, 1)
    assert bells() == 2


def test_a_few_images_leave_no_files_and_more_do(service: Service, checkpoint: Checkpoint, worker: Inference) -> None:
    few, many = score(service, checkpoint, 32), score(service, checkpoint, 33)
    worker.drain()
    assert not service.jobs.get(few.id).artifacts
    assert "likelihood.csv" in service.artifacts(service.jobs.get(many.id)).files


def test_a_cold_start_is_told(service: Service, checkpoint: Checkpoint, worker: Inference) -> None:
    first = score(service, checkpoint, 1)
    worker.drain()
    second = score(service, checkpoint, 1)
    worker.drain()
    cold, warm = (service.jobs.get(job.id).result for job in (first, second))
    assert cold is not None
    assert warm is not None
    assert cold["cold_start_seconds"] > 0 == warm["cold_start_seconds"]


def test_a_request_that_fails_does_not_take_its_batch_with_it(
    service: Service, checkpoint: Checkpoint, worker: Inference
) -> None:
    good, bad, other = (score(service, checkpoint, 1, seed) for seed in range(3))
    plan = bad.plan | {"images": bad.plan["images"] | {"pixels": ""}}
    service.redis.hset(f"flowpp:job:{bad.id}", "plan", json.dumps(plan))
    worker.drain()
    assert [service.jobs.get(job.id).status for job in (good, bad, other)] == ["succeeded", "failed", "succeeded"]
    error = service.jobs.get(bad.id).error
    assert error is not None
    assert error.code == "internal"


def test_a_result_that_cannot_be_written_fails_its_own_request_alone(
    service: Service, checkpoint: Checkpoint, worker: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = score(service, checkpoint, 33), score(service, checkpoint, 1, seed=1)
    put = service.store.put

    def full(prefix: str, *arguments: object, **named: object) -> object:
        if bad.id in prefix:
            raise OSError(28, "No space left on device")
        return put(prefix, *arguments, **named)

    monkeypatch.setattr(service.store, "put", full)
    worker.drain()
    failed = service.jobs.get(bad.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "No space left" in failed.error.message
    assert service.jobs.get(good.id).status == "succeeded"


def test_a_request_cancelled_while_it_is_computed_is_cancelled(
    service: Service, checkpoint: Checkpoint, worker: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = score(service, checkpoint, 64, importance_samples=64)  # 64 batches
    compute = LikelihoodWork.compute

    def cancel(model: FlowPP, rows: Sequence[tuple[Work, int]], batch_size: int) -> np.ndarray:
        if service.jobs.get(job.id).status == "running":
            service.jobs.cancel(job.id)
        threading.Event().wait(0.05)
        return compute(model, rows, batch_size)

    monkeypatch.setattr(LikelihoodWork, "compute", staticmethod(cancel))
    worker.drain()
    assert service.jobs.get(job.id).status == "cancelled"
    assert not service.jobs.get(job.id).artifacts


def test_a_request_that_another_worker_has_by_now_is_left_to_it(
    service: Service, checkpoint: Checkpoint, worker: Inference
) -> None:
    lost, kept = score(service, checkpoint, 1), score(service, checkpoint, 1, seed=1)
    claimed = service.jobs.claim("inference", "a worker", 64)
    service.redis.zadd("flowpp:leases", {lost.id: 0})
    service.jobs.reap()
    [again] = service.jobs.claim("inference", "another worker", 64)
    worker.answer(claimed)
    assert service.jobs.get(lost.id) == again
    assert service.jobs.get(kept.id).status == "succeeded"


def test_a_worker_that_shuts_down_puts_its_requests_back(service: Service, checkpoint: Checkpoint) -> None:
    shutdown = threading.Event()
    job = score(service, checkpoint, 2)
    [claimed] = service.jobs.claim("inference", "a worker", 64)
    shutdown.set()
    worker = Inference(service, "a worker", shutdown)
    worker.answer([claimed])
    after = service.jobs.get(job.id)
    assert (after.status, after.failures) == ("queued", 0)
    Inference(service, "another worker", threading.Event()).drain()
    assert service.jobs.get(job.id).status == "succeeded"


def test_samples_of_one_seed_are_the_same_in_any_company(
    service: Service, checkpoint: Checkpoint, worker: Inference
) -> None:
    def samples(*counts: int) -> np.ndarray:
        jobs = [
            submit_one(service, prepare_sampling(service, SamplingRequest(model=checkpoint.id, num_samples=n, seed=i)))
            for i, n in enumerate(counts)
        ]
        worker.drain()
        with service.store.open(service.jobs.get(jobs[0].id).artifacts, "samples.npz") as file:
            return np.load(file)["images"]

    alone, together = samples(4), samples(4, 5)
    assert alone.shape == (4, 8, 8, 3)
    assert (alone == together).mean() > 0.99  # batches of another size round otherwise


def test_the_least_recently_used_model_gives_way(service: Service, saved: Path) -> None:
    first, second, third = (service.checkpoints.register(saved) for _ in range(3))
    size = sum(tensor.nbytes for tensor in FlowPP.load(saved).state_dict().values())
    models = WarmModels(service.checkpoints, 2 * size)
    model = models.get(first)
    models.get(second)
    assert models.get(first) is model
    models.get(third)
    assert [checkpoint.id in models for checkpoint in (first, second, third)] == [True, False, True]
    small = WarmModels(service.checkpoints, 0)
    assert small.get(first) is small.get(first)


def test_a_batch_of_several_requests_is_a_span_of_one_attempt_and_linked_to_the_others(
    service: Service, checkpoint: Checkpoint, worker: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting(monkeypatch) as collector:
        with tracing.sending("worker"):
            asked = [tracing.begin("POST", "server") for _ in range(3)]
            for n, request in enumerate(asked, start=1):
                likelihood = LikelihoodRequest(model=checkpoint.id)
                submit_one(
                    service,
                    prepare_likelihood(service, likelihood, images(n), terms=Terms(traceparent=request.traceparent)),
                )
                request.end()
            worker.drain()
        [batch] = collector.named("batch")
        attempts = collector.named("likelihood attempt")
        requests = {span.id: span.trace for span in collector.named("POST")}
    assert {attempt.parent: attempt.trace for attempt in attempts} == requests
    assert len(set(requests.values())) == 3, "each request has a trace of its own"
    assert {batch.parent, *batch.links} == {attempt.id for attempt in attempts}
    assert len(batch.links) == 2
    assert batch.trace in requests.values()
    assert batch.attributes == {
        "flowpp.job.type": "likelihood",
        "flowpp.checkpoint.id": checkpoint.id,
        "flowpp.batch.images": 6,
        "flowpp.batch.jobs": 3,
    }


def test_a_request_that_fails_is_a_failed_attempt(
    service: Service, checkpoint: Checkpoint, worker: Inference, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting(monkeypatch) as collector:
        with tracing.sending("worker"):
            score(service, checkpoint, 1)
            shutil.rmtree(Path(service.settings.store_url) / "checkpoints")
            worker.drain()
        [attempt], [batch] = collector.named("likelihood attempt"), collector.named("batch")
    assert (attempt.failed, batch.failed) == (True, True)
    assert attempt.attributes["flowpp.job.outcome"] == "failed"
    assert (attempt.parent, batch.parent) == ("", attempt.id), "who submitted it was not seen in traces"


@pytest.fixture
def diverged(service: Service, saved: Path, tmp_path: Path) -> Checkpoint:
    """A model with NaN weights, as after a training that diverged."""
    import torch

    model = FlowPP.load(saved)
    with torch.no_grad():
        next(model.flow.parameters()).fill_(float("nan"))
    model.save(tmp_path / "diverged")
    return service.checkpoints.register(tmp_path / "diverged")


def test_jobs_of_a_diverged_model_fail_as_not_finite_and_others_do_not(
    service: Service, checkpoint: Checkpoint, diverged: Checkpoint, worker: Inference
) -> None:
    failing = [
        score(service, diverged, 2),
        score(service, diverged, 40),
        score(service, diverged, 2, importance_samples=3),
        submit_one(service, prepare_sampling(service, SamplingRequest(model=diverged.id, num_samples=3))),
        submit_one(
            service,
            prepare_sampling(service, SamplingRequest(model=diverged.id, num_samples=3), images(2)),
        ),
    ]
    fine = score(service, checkpoint, 2)
    worker.drain()
    for job in failing:
        ended = service.jobs.get(job.id)
        assert (ended.status, ended.result) == ("failed", None)
        assert ended.error is not None
        assert ended.error.code == "not_finite"
        assert "not finite (NaN or infinite): the model has diverged" in ended.error.message
    assert service.jobs.get(fine.id).status == "succeeded"


def test_a_plot_that_fails_costs_a_likelihood_job_nothing_else(
    service: Service,
    worker: Inference,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "flowpp.plots", None)  # its import raises
    job = score(service, checkpoint, MOST_IN_RECORD + 1)
    worker.drain()
    ended = service.jobs.get(job.id)
    assert ended.status == "succeeded"
    assert service.store.manifest(ended.artifacts).files.keys() >= {"likelihood.json", "likelihood.csv"}
    assert "likelihood.png could not be drawn: ModuleNotFoundError" in caplog.text
