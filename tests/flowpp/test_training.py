"""Training: it learns, resumes bit for bit, stops with a checkpoint, and says why it fails."""

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowpp.batches import Batches
from flowpp.checkpoint import EMA, MODEL, OPTIMIZER, describe_file, newest_complete, read_manifest
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.data import ImageSet, build_image_set
from flowpp.learner import Learner, learning_rate
from flowpp.likelihood import to_symbols
from flowpp.model import FlowPP
from flowpp.presets import PRESETS, resolve_model, resolve_training
from flowpp.processes import Processes
from flowpp.recording import record
from flowpp.run_directory import BadRunDirectory, RunConfig, RunDirectory, TrainingError
from flowpp.sources import Split, open_images
from flowpp.training import naming_failures, never, train

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
TIMINGS = {"time", "images_per_second"}


@pytest.fixture(scope="session")
def model(image_set: ImageSet) -> ModelConfig:
    return resolve_model("tiny", {"dropout": 0.1}, image_set.shape)


def recipe(**changes: Any) -> TrainingConfig:
    return resolve_training("tiny", changes)


def metrics(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl, but what the clock says."""
    rows = RunDirectory(directory).read_metrics()
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, average, optimizer and metrics are equal, bit for bit."""
    ends = [newest_complete(directory) for directory in (one, other)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].name == ends[1].name
    for file in ends[0].glob("*.safetensors"):
        expected, found = load_file(file), load_file(ends[1] / file.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), file.name
    assert metrics(one) == metrics(other)
    assert read_manifest(ends[0]).unlogged == read_manifest(ends[1]).unlogged


class Stopping:
    """Runs a training to the end, or stops it after a step: asks at every question from then on."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.learner: Learner | None = None

    def __call__(self) -> bool:
        return self.learner is not None and self.learner.step >= self.after


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Stopping]:
    """Makes a `stop` that says yes from the end of a step on: before it is evaluated, where it would be."""
    take_step, stops = Learner.take_step, []

    def remember(learner: Learner, images: torch.Tensor) -> None:
        take_step(learner, images)
        for stop in stops:
            stop.learner = learner

    def make(after: int) -> Stopping:
        stops.append(Stopping(after))
        return stops[-1]

    monkeypatch.setattr(Learner, "take_step", remember)
    return make


def test_training_lowers_bits_per_dim(finished_run: Path) -> None:
    rows = metrics(finished_run)
    first, last = (row["validation_bits_per_dim"] for row in rows if "validation_bits_per_dim" in row)
    assert last < first - 0.2
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["images_seen"] for row in rows] == list(range(8, 161, 8))


@pytest.mark.parametrize("stopped_at", [4, 10, 13])
def test_a_stopped_run_resumes_bit_for_bit(
    stopped_at: int, tmp_path: Path, image_set: ImageSet, model: ModelConfig, stop_after: Callable[[int], Stopping]
) -> None:
    training = recipe(log_every=3, seed=stopped_at, horizontal_flips=stopped_at == 4, weight_decay=0.1)
    for _ in train(tmp_path / "whole", model=model, training=training, images=image_set):
        pass
    resumed = tmp_path / "resumed"
    events = list(train(resumed, model=model, training=training, images=image_set, stop=stop_after(stopped_at)))
    assert [event.step for event in events] == list(range(1, stopped_at + 1))
    assert events[-1].checkpoint == RunDirectory(resumed).checkpoint(stopped_at)
    torch.manual_seed(stopped_at)  # nobody's draws change a run
    first = next(iter(train(resumed)))
    if stopped_at == 10:  # whose evaluation is still to come
        assert (first.step, first.checkpoint, "validation_bits_per_dim" in first.metrics) == (10, None, True)
    else:
        assert first.step == stopped_at + 1
    for _ in train(resumed):
        pass
    assert_same_run(tmp_path / "whole", resumed)
    for step in (10, 20) if stopped_at == 10 else (20,):
        ends = [read_manifest(RunDirectory(tmp_path / run).checkpoint(step)) for run in ("whole", "resumed")]
        known = [{**end.metrics, "images_per_second": None} for end in ends]
        assert known[0] == known[1], "a checkpoint's metrics are known in the end"
    assert (resumed / "samples" / "step-00000020.png").read_bytes() == (
        tmp_path / "whole" / "samples" / "step-00000020.png"
    ).read_bytes()


@pytest.mark.parametrize("lost_at", [7, 17])
def test_an_interrupted_run_resumes_from_its_last_checkpoint_and_repeats_no_step(
    lost_at: int, tmp_path: Path, finished_run: Path, image_set: ImageSet, model: ModelConfig
) -> None:
    events = train(tmp_path, model=model, training=PRESETS["tiny"].training, images=image_set)
    for event in events:
        if event.step == lost_at:
            break
    events.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "ima')  # a line that was being written
    resumed = [event.step for event in train(tmp_path)]
    assert resumed == list(range(lost_at // 10 * 10 + 1, 21))
    assert_same_run(finished_run, tmp_path)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    tmp_path: Path, finished_run: Path
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    weights = run / "checkpoints" / "step-00000020" / MODEL
    weights.write_bytes(bytes(weights.stat().st_size))
    assert [event.step for event in train(run)] == list(range(11, 21))
    assert_same_run(finished_run, run)


def test_a_finished_run_has_nothing_left_to_do(finished_run: Path) -> None:
    assert list(train(finished_run)) == []


def test_a_stop_before_the_first_step_takes_none(tmp_path: Path, image_set: ImageSet, model: ModelConfig) -> None:
    assert list(train(tmp_path, model=model, training=recipe(), images=image_set, stop=lambda: True)) == []
    assert newest_complete(tmp_path) is None


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path, image_set: ImageSet, model: ModelConfig) -> None:
    # after step 6 the steps are too long, so that an early checkpoint stays the best
    milestones = [{"step": step, "factor": factor} for step, factor in ((0, 0.006), (6, 0.006), (6, 1))]
    training = recipe(
        steps=12, warmup_steps=0, learning_rate=0.5, ema_decay=0, checkpoint_every=2, evaluation_every=2,
        keep_checkpoints=2, gradient_clip=1e6, milestones=milestones,
    )  # fmt: skip
    scores: dict[int, float] = {}
    for event in train(tmp_path, model=model, training=training, images=image_set):
        if event.checkpoint:
            scores[event.step] = event.metrics["validation_bits_per_dim"]
    best = min(scores, key=lambda step: scores[step])
    assert best < 10
    run = RunDirectory(tmp_path)
    assert [path.name for path in run.checkpoints()] == [run.checkpoint(step).name for step in (best, 10, 12)]
    assert run.best_checkpoint() == run.checkpoint(best)


def test_a_warm_start_begins_with_a_checkpoints_weights_and_nothing_else_of_it(
    tmp_path: Path, finished_run: Path, image_set: ImageSet, model: ModelConfig
) -> None:
    origin = finished_run / "checkpoints" / "step-00000010"
    still = recipe(steps=1, learning_rate=1e-12, ema_decay=1 - 1e-12, warmup_steps=0, seed=5, batch_size=4)
    undropped = model.model_copy(update={"dropout": 0.0})
    [event] = train(tmp_path / "a", model=undropped, training=still, images=image_set, resume_from=origin)
    assert (event.step, event.images_seen) == (1, 4)
    assert event.note == f"warm start from the weights of {origin}, of step 10"
    end = newest_complete(tmp_path / "a")
    assert end is not None
    for name in (MODEL, EMA):
        before, after = load_file(origin / name), load_file(end / name)
        assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before), name
    assert read_manifest(end).warm_start_sha256 == describe_file(origin / MODEL).sha256
    assert load_file(end / OPTIMIZER)[f"step.{next(iter(before))}"] == 1


def test_a_warm_start_takes_any_checkpoint(
    tmp_path: Path, finished_run: Path, image_set: ImageSet, model: ModelConfig
) -> None:
    FlowPP.load(finished_run / "checkpoints" / "step-00000020").save(tmp_path / "exported")
    training = recipe(steps=4, warmup_steps=0)
    first, *_ = train(
        tmp_path / "run", model=model, training=training, images=image_set, resume_from=tmp_path / "exported"
    )
    anew, *_ = train(tmp_path / "anew", model=model, training=training, images=image_set)
    assert first.metrics["train_bits_per_dim"] < anew.metrics["train_bits_per_dim"] - 0.2


def test_a_warm_started_run_resumes_its_own_checkpoints(
    tmp_path: Path, finished_run: Path, image_set: ImageSet, model: ModelConfig, stop_after: Callable[[int], Stopping]
) -> None:
    origin = finished_run / "checkpoints" / "step-00000020"
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for _ in train(whole, model=model, training=recipe(), images=image_set, resume_from=origin):
        pass
    stop = stop_after(7)
    for _ in train(resumed, model=model, training=recipe(), images=image_set, resume_from=origin, stop=stop):
        pass
    first, *_ = train(resumed)
    assert (first.step, first.note) == (8, "goes on from step-00000007")
    assert_same_run(whole, resumed)


def test_a_warm_start_from_a_model_of_another_kind_is_refused(
    tmp_path: Path, finished_run: Path, image_set: ImageSet, model: ModelConfig
) -> None:
    origin, wide = finished_run / "checkpoints" / "step-00000020", model.model_copy(update={"filters": 16})
    with pytest.raises(BadRunDirectory, match="its filters is 8, and the model's 16"):
        next(iter(train(tmp_path, model=wide, training=recipe(), images=image_set, resume_from=origin)))


def test_a_run_directory_is_one_run(
    finished_run: Path, image_set: ImageSet, model: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(BadRunDirectory, match="another run"):
        next(iter(train(finished_run, model=model, training=recipe(seed=7), images=image_set)))
    with pytest.raises(BadRunDirectory, match=r"config\.json is missing"):
        next(iter(train(tmp_path)))
    with pytest.raises(ValueError, match="belong together"):
        next(iter(train(tmp_path, model=model)))


FEW: dict[str, tuple[Callable[[np.ndarray], np.ndarray], dict[str, int], str]] = {
    "one image": (lambda images: images[:1], {}, "a new model needs at least 4 training images; there are 1"),
    "three images": (lambda images: images[:3], {}, "a new model needs at least 4 training images; there are 3"),
    "a small first batch": (lambda images: images, {"init_batch_size": 3}, "an init_batch_size of at least 4; it is 3"),
    "one image many times": (lambda images: images[:1].repeat(20, 0), {}, "1 of them different; .* at least 4"),
    "black images": (np.zeros_like, {}, "1 of them different; .* at least 4 different images"),
}


@pytest.mark.parametrize("name", FEW)
def test_too_few_images_are_a_bad_dataset_with_the_number_needed(
    tmp_path: Path, image_set: ImageSet, model: ModelConfig, name: str
) -> None:
    few, changes, sentence = FEW[name]
    np.save(tmp_path / "few.npy", few(image_set.images))
    images = build_image_set(tmp_path / "few.npy", tmp_path / "set", validation_fraction=0)
    with pytest.raises(TrainingError, match=sentence) as caught:
        list(train(tmp_path / "run", model=model, training=recipe(**changes), images=images))
    assert caught.value.code == "bad_dataset"


def test_a_warm_start_goes_on_with_one_image(
    tmp_path: Path, image_set: ImageSet, model: ModelConfig, finished_run: Path
) -> None:
    np.save(tmp_path / "one.npy", image_set.images[:1])
    one = build_image_set(tmp_path / "one.npy", tmp_path / "set", validation_fraction=0)
    origin = finished_run / "checkpoints" / "step-00000020"
    settings = recipe(steps=2, batch_size=1)
    events = list(train(tmp_path / "run", model=model, training=settings, images=one, resume_from=origin))
    assert events[-1].metrics["train_bits_per_dim"] < 16


def test_samples_that_are_not_finite_are_noted_and_end_no_run(
    tmp_path: Path, image_set: ImageSet, model: ModelConfig
) -> None:
    """The average is damaged in a checkpoint, and no evaluation is due before the samples are."""
    settings = recipe(sample_every=5, evaluation_every=20, checkpoint_every=3)
    for event in train(tmp_path, model=model, training=settings, images=image_set):
        if event.step == 4:
            break
    checkpoint = tmp_path / "checkpoints" / "step-00000003"
    average = {name: torch.full_like(value, math.nan) for name, value in load_file(checkpoint / EMA).items()}
    save_file(average, checkpoint / EMA)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][EMA] = describe_file(checkpoint / EMA).model_dump()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    notes = {}
    for event in train(tmp_path):
        notes[event.step] = event.note
        if event.step == 6:
            break
    assert notes[5] == "no samples at step 5: the model decodes to numbers that are not finite"
    assert not list(tmp_path.glob("samples/*"))


def test_images_that_do_not_fit_are_a_bad_dataset(
    tmp_path: Path, image_set: ImageSet, finished_run: Path, model: ModelConfig
) -> None:
    def refused(directory: Path, **arguments: Any) -> str:
        with pytest.raises(TrainingError) as caught:
            next(iter(train(directory, **arguments)))
        assert caught.value.code == "bad_dataset"
        return str(caught.value)

    wide = resolve_model("tiny", {}, (3, 8, 16))
    assert "16 pixels wide" in refused(tmp_path / "a", model=wide, training=recipe(), images=image_set)
    assert "no such file" in refused(tmp_path / "b", model=model, training=recipe(), images=tmp_path / "none.zip")
    run = shutil.copytree(finished_run, tmp_path / "c")
    np.save(tmp_path / "others.npy", image_set.images[:50])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(tmp_path / "others.npy")}))
    assert "other images" in refused(run)


def test_a_loss_that_stays_non_finite_after_the_rollback_fails_with_its_step_and_saves_nothing(
    tmp_path: Path, finished_run: Path, image_set: ImageSet, model: ModelConfig
) -> None:
    poisoned = shutil.copytree(finished_run / "checkpoints" / "step-00000010", tmp_path / "poisoned")
    weights = load_file(poisoned / MODEL)
    weights[min(weights)].fill_(math.nan)
    save_file(weights, poisoned / MODEL)
    manifest = json.loads((poisoned / "manifest.json").read_text())
    manifest["files"][MODEL] = describe_file(poisoned / MODEL).model_dump()
    (poisoned / "manifest.json").write_text(json.dumps(manifest))

    run = tmp_path / "run"
    run.mkdir()
    training = recipe(log_every=100, checkpoint_every=15, evaluation_every=100)

    def fail() -> None:
        with record(RunDirectory(run)) as recorder:
            for event in train(run, model=model, training=training, images=image_set, resume_from=poisoned):
                recorder.step = event.step

    with pytest.raises(TrainingError, match="5 steps in a row were not finite: at step 5 the loss was nan") as caught:
        fail()
    assert (caught.value.code, caught.value.step) == ("nan_loss", 5)
    assert newest_complete(run) is None
    assert metrics(run) == []
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["code"], result["step"]) == ("failed", "nan_loss", 4)


def poison(learner: Learner, *steps: int) -> None:
    """Makes the gradients of these steps infinite."""
    parameter = next(learner.model.parameters())
    parameter.register_hook(lambda gradient: gradient * math.inf if learner.step in steps else gradient)


def test_a_step_that_is_not_finite_is_skipped_and_counted(image_set: ImageSet, model: ModelConfig) -> None:
    learner = Learner(model, recipe(warmup_steps=0), ALONE)
    images = to_symbols(image_set.images[:8], learner.model)
    learner.initialize(images)
    poison(learner, 2, 3)
    for step in range(1, 5):
        before = [parameter.clone() for parameter in learner.model.parameters()]
        learner.take_step(images)
        moved = any(not torch.equal(*pair) for pair in zip(before, learner.model.parameters(), strict=True))
        assert moved == (step in (1, 4))
    assert (learner.step, learner.images_seen) == (4, 32)
    assert learner.unlogged.means()["skipped_steps"] == 2
    assert learner.unlogged.read()["steps"] == 2


def test_a_run_that_loses_its_weights_is_rolled_back_once_with_a_lower_learning_rate(
    tmp_path: Path, image_set: ImageSet, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    initialize, learners = Learner.initialize, []

    def remember(learner: Learner, images: torch.Tensor) -> None:
        initialize(learner, images)
        poison(learner, *range(9, 100))  # the first learner only: the next is loaded
        learners.append(learner)

    monkeypatch.setattr(Learner, "initialize", remember)
    training = recipe(steps=20, log_every=1, checkpoint_every=4, evaluation_every=100)
    events = list(train(tmp_path, model=model, training=training, images=image_set))
    _, note = [event.note for event in events if event.note]
    assert len(learners) == 1
    assert "at step 13 the loss was" in note
    assert "rolled back to step 12, with 0.1 of the learning rate" in note
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["step"] for row in rows if "skipped_steps" in row] == [9, 10, 11, 12]
    assert rows[12]["learning_rate"] == pytest.approx(0.1 * training.learning_rate)
    last = newest_complete(tmp_path)
    assert last is not None
    assert read_manifest(last).learning_rate_factor == 0.1


def test_memory_that_runs_out_is_named_with_what_it_takes(model: ModelConfig) -> None:
    config = RunConfig(model=model, training=recipe(), data="images")
    said = r"out of memory on cpu: 8 images a forward pass take about .* GiB, of .* GiB there are"
    with pytest.raises(TrainingError, match=said) as caught, naming_failures(config, CPU):
        torch.empty(2**60, dtype=torch.uint8)
    assert caught.value.code == "out_of_memory"


def test_another_failure_keeps_its_name(model: ModelConfig) -> None:
    config = RunConfig(model=model, training=recipe(), data="images")
    with pytest.raises(RuntimeError, match="must match"), naming_failures(config, CPU):
        torch.zeros(2) + torch.zeros(3)


def test_every_image_comes_once_an_epoch() -> None:
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    batches = Batches(images, recipe(batch_size=20, seed=3), ALONE)
    order = np.concatenate([batches.after(seen).ravel() for seen in range(0, 200, 20)])
    epochs = order.reshape(4, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_flips_mirror_half_of_the_images_anew_each_epoch_and_nothing_else() -> None:
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1) * np.array([1, 6], np.uint8).reshape(1, 1, 2, 1)
    images = np.broadcast_to(images, (40, 3, 2, 1))
    flipped, plain = (Batches(images, recipe(batch_size=20, horizontal_flips=flips), ALONE) for flips in (True, False))
    pairs = [(flipped.after(seen), plain.after(seen)) for seen in range(0, 400, 20)]
    mirrored = np.array([[np.array_equal(a, b[:, ::-1]) for a, b in zip(*pair, strict=True)] for pair in pairs])
    same = np.array([[np.array_equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs])
    assert (mirrored | same).all()
    assert 0.4 < mirrored.mean() < 0.6
    epochs = mirrored.reshape(10, 40)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    halves = [
        Batches(images, recipe(batch_size=20, horizontal_flips=True), Processes(rank, 2, CPU)).after(60)
        for rank in (0, 1)
    ]
    assert np.array_equal(np.concatenate(halves), pairs[3][0]), "the processes see what one would see"


def test_decay_shrinks_the_convolutions_alone(model: ModelConfig, image_set: ImageSet) -> None:
    images = to_symbols(image_set.training[:8], FlowPP(model))
    ends = []
    for decay in (0.0, 0.5):
        learner = Learner(model, recipe(warmup_steps=0, learning_rate=0.1, weight_decay=decay), ALONE)
        learner.initialize(images)
        start = {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}
        learner.take_step(images)
        ends.append(dict(learner.model.named_parameters()))
    for name, tensor in start.items():
        shrunk = 0.1 * 0.5 * tensor if "proj_" in name and name.endswith("weight") else 0
        torch.testing.assert_close(ends[0][name] - ends[1][name], shrunk + torch.zeros_like(tensor), atol=1e-6, rtol=0)


def test_metrics_name_what_is_beyond_the_paper(tmp_path: Path, image_set: ImageSet, model: ModelConfig) -> None:
    options = {"horizontal_flips": True, "weight_decay": 0.01, "conditioner_precision": "bfloat16"}
    [event] = train(tmp_path, model=model, training=recipe(steps=1, **options), images=image_set)
    named = {"horizontal_flips": 1.0, "weight_decay": 0.01, "bfloat16_conditioners": 1.0}
    assert named.items() <= event.metrics.items()
    assert event.checkpoint is not None
    assert named.items() <= read_manifest(event.checkpoint).metrics.items()
    assert recipe().beyond_the_paper == {}


def test_samples_are_drawn_at_intervals_from_the_same_latents(
    tmp_path: Path, image_set: ImageSet, model: ModelConfig
) -> None:
    for _ in train(tmp_path, model=model, training=recipe(steps=5, sample_every=2), images=image_set):
        pass
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-00000002.png", "step-00000004.png", "step-00000005.png"]
    _, grid = open_images([tmp_path / "samples" / names[0]], Split.ALL)[:2]
    assert grid.shape == (1, 32, 32, 3)


class FullDisk:
    """Refuses to make checkpoints, as a full disk would, so many times."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, *_: object, **__: object) -> None:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_delays_a_checkpoint_and_ends_nothing(
    tmp_path: Path, finished_run: Path, image_set: ImageSet, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, sync = FullDisk(times=2), RunDirectory.sync_metrics

    def full(run: RunDirectory) -> None:
        disk()
        sync(run)

    monkeypatch.setattr(RunDirectory, "sync_metrics", full)
    monkeypatch.setattr("flowpp.ledger._PAUSE_SECONDS", 0)
    events = list(train(tmp_path, model=model, training=PRESETS["tiny"].training, images=image_set))
    written = [event.step for event in events if event.checkpoint]
    assert written == [12, 20]
    notes = [event.note for event in events if event.note]
    assert "step-00000010 cannot be written yet, and will be tried again: [Errno 28]" in notes[1]
    assert metrics(tmp_path) == metrics(finished_run)


def test_a_disk_that_stays_full_fails_the_run_by_its_name(
    tmp_path: Path, image_set: ImageSet, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDirectory, "sync_metrics", FullDisk(times=1_000_000))
    monkeypatch.setattr("flowpp.ledger._PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("flowpp.ledger.PATIENCE_SECONDS", 0.1)
    with pytest.raises(TrainingError, match="step-00000003 could not be written") as caught:
        list(train(tmp_path, model=model, training=recipe(steps=3), images=image_set))
    assert caught.value.code == "disk_full"


def test_the_average_begins_as_a_copy_and_moves_by_one_minus_the_decay(model: ModelConfig, image_set: ImageSet) -> None:
    learner = Learner(model, recipe(ema_decay=0.75, warmup_steps=0), ALONE)
    images = torch.from_numpy(image_set.training[:16].transpose(0, 3, 1, 2).copy())
    learner.initialize(images)
    start = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    assert all(torch.equal(start[name], tensor) for name, tensor in learner.ema.state_dict().items())
    learner.take_step(images[:8])
    for name, parameter in learner.model.named_parameters():
        expected = 0.75 * start[name] + 0.25 * parameter.detach()
        torch.testing.assert_close(learner.ema.get_parameter(name), expected)
    assert any(not torch.equal(start[name], tensor) for name, tensor in learner.model.state_dict().items())


def test_steps_leave_other_peoples_random_numbers_alone(model: ModelConfig, image_set: ImageSet) -> None:
    before = torch.get_rng_state()
    learner = Learner(model, recipe(), ALONE)
    images = torch.from_numpy(image_set.training[:8].transpose(0, 3, 1, 2).copy())
    learner.initialize(images)
    learner.take_step(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_learning_rate_rises_holds_and_falls_linearly() -> None:
    training = recipe(steps=100, warmup_steps=10, cooldown_steps=20, learning_rate=0.5)
    rates = np.array([learning_rate(training, step) for step in range(1, 101)])
    np.testing.assert_allclose(np.diff(rates[:10]), 0.05)
    np.testing.assert_allclose(rates[9:80], 0.5)
    np.testing.assert_allclose(np.diff(rates[79:]), -0.5 / 21)
    assert rates[-1] == pytest.approx(0.5 / 21)


def test_a_set_without_validation_images_trains_without_a_best_checkpoint(
    tmp_path: Path, images_file: Path, model: ModelConfig
) -> None:
    images = build_image_set(images_file, tmp_path / "set", validation_fraction=0)
    events = list(train(tmp_path / "run", model=model, training=recipe(steps=3), images=images, stop=never))
    assert events[-1].checkpoint is not None
    assert "validation_bits_per_dim" not in events[-1].metrics
    assert RunDirectory(tmp_path / "run").best_checkpoint() is None
