"""Divergence: which runs are warned of, which fail, and which checkpoint is left."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowpp.config import TrainingConfig
from flowpp.data import ImageSet, build_image_set
from flowpp.divergence import DIVERGED, Divergence
from flowpp.presets import resolve_model, resolve_training
from flowpp.recording import record
from flowpp.run_directory import RunDirectory, TrainingError, find_checkpoint
from flowpp.training import Event, train

RECIPE = TrainingConfig(steps=5_000, warmup_steps=100)
Row = tuple[int, float | None, float | None]


def rows(series: Iterable[Row]) -> list[dict[str, float]]:
    """Rows of metrics, of (step, training, validation)."""
    return [
        {"step": step}
        | ({} if training is None else {"train_bits_per_dim": training})
        | ({} if validation is None else {"validation_bits_per_dim": validation})
        for step, training, validation in series
    ]


def follow(series: Iterable[Row], recipe: TrainingConfig = RECIPE, bits: int = 8) -> tuple[Divergence, list[str]]:
    divergence = Divergence(bits, recipe)
    return divergence, [note for row in rows(series) if (note := divergence.take(row))]


@pytest.mark.parametrize(
    ("name", "series", "recipe", "fails", "warnings"),
    [
        ("learns", [(step, 9 - step / 1_000, None) for step in range(100, 5_001, 100)], RECIPE, False, 2),
        ("noise that no model compresses", [(s, 8.2, 8.3) for s in range(100, 5_001, 100)], RECIPE, False, 2),
        ("falls slowly from far above", [(s, 15 - s / 2_500, None) for s in range(100, 5_001, 100)], RECIPE, False, 1),
        ("a peak in the warm-up", [(100, 1e6, None), (200, 5.0, None), (5_000, 4.0, 4.1)], RECIPE, False, 0),
        ("a peak that is gone", [(1_000, 5, 5), (1_100, 1e6, None), (1_200, 5, 5), (5_000, 4, 4)], RECIPE, False, 2),
        ("rises at the end", [(4_000, 5, 5), (5_000, 12, 11)], RECIPE, True, 1),
        ("rises little, above the uniform code", [(4_000, 7.5, 7.5), (5_000, 8.4, 8.4)], RECIPE, False, 1),
        ("hopeless from the beginning", [(s, 1e12, None) for s in range(100, 5_001, 100)], RECIPE, True, 1),
        ("hopeless in one row alone", [(5_000, 27_302.0, None)], RECIPE, True, 1),
        ("falls, and stays hopeless", [(s, 1e9 / s, 1e9 / s) for s in range(100, 5_001, 100)], RECIPE, True, 2),
        ("overfits", [(s, 7 - s / 1e3, 7 + s / 100) for s in range(100, 5_001, 100)], RECIPE, False, 1),
        ("an average that is still good", [(4_000, 5, 5), (5_000, 12, 5.1)], RECIPE, False, 1),
        ("an average that is lost", [(4_000, 5, 5), (4_500, 1e5, None), (5_000, 7, 27_302.0)], RECIPE, True, 2),
        ("skipped steps have no figure", [(s, None, None) for s in range(100, 5_001, 100)], RECIPE, False, 0),
        ("two steps", [(1, 8.3, None), (2, 9.1, 8.5)], TrainingConfig(steps=2, warmup_steps=0), False, 0),
        ("two, from few images", [(1, 35, None), (2, 42, 38)], TrainingConfig(steps=2, warmup_steps=0), False, 1),
        ("a short one that is lost", [(1, 7, None), (2, 900, 800)], TrainingConfig(steps=2, warmup_steps=1), True, 1),
    ],
)
def test_which_runs_fail(name: str, series: list[Row], recipe: TrainingConfig, fails: bool, warnings: int) -> None:
    divergence, notes = follow(series, recipe)
    assert (divergence.failure is not None) is fails, divergence.failure
    assert len(notes) == warnings, notes


def test_a_run_has_a_thousand_steps_to_recover_or_its_warm_up_again() -> None:
    good = [(step, 5.0, None) for step in range(100, 2_001, 100)]
    for warmup, patience in ((100, 1_000), (1_500, 1_500)):
        recipe = TrainingConfig(steps=50_000, warmup_steps=warmup)
        divergence, _ = follow(good, recipe)
        failed = next(
            step
            for step in range(2_100, 50_000, 100)
            if divergence.take({"step": step, "train_bits_per_dim": 1e4}) or divergence.failure
            if divergence.failure
        )
        assert failed == 2_000 + patience


def test_the_bound_is_what_the_models_own_bits_cost() -> None:
    series: list[Row] = [(1_000, 0.5, None), (4_000, 2.0, None), (5_000, 2.0, None)]
    assert follow(series, bits=1)[0].failure is not None
    assert follow(series, bits=3)[0].failure is None


def test_a_resumed_run_decides_as_one_that_was_not_interrupted() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        values = np.exp(random.normal(2, 1, 60)).tolist()
        series: list[Row] = [
            (100 * (i + 1), value, value * 1.1 if i % 5 == 4 else None) for i, value in enumerate(values)
        ]
        cut = int(random.integers(1, 60))
        whole, told = follow(series)
        resumed, before = follow(series[:cut])
        resumed, _ = follow(series[:cut])  # what the next process reads from metrics.jsonl
        after = [note for row in rows(series[cut:]) if (note := resumed.take(row))]
        assert before + after == told
        assert (resumed.failure, resumed.metrics) == (whole.failure, whole.metrics)


def trained(run: Path, images: ImageSet, **changes: Any) -> list[Event]:
    """The events of a run of `tiny`, which leaves a result."""
    model, recipe = resolve_model("tiny", {}, images.shape), resolve_training("tiny", changes)
    events = []
    with record(RunDirectory(run)) as recorder:
        for event in train(run, model=model, training=recipe, images=images):
            recorder.step = event.step
            events.append(event)
    return events


@pytest.mark.parametrize("steps", [5, 20])
def test_a_learning_rate_far_too_high_fails_as_diverged(tmp_path: Path, image_set: ImageSet, steps: int) -> None:
    with pytest.raises(TrainingError, match="a uniform code costs 8") as caught:
        trained(tmp_path / "run", image_set, steps=steps, learning_rate=1.0)
    assert (caught.value.code, caught.value.step) == ("diverged", steps)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["code"]) == ("failed", "diverged")
    assert (tmp_path / "run" / "training_curve.png").exists()
    with pytest.raises(TrainingError, match="has diverged"):  # and takes no further step
        next(train(tmp_path / "run"))


@pytest.mark.parametrize("steps", [2, 5, 20, 60])
def test_a_run_that_has_hardly_begun_or_has_only_noise_does_not_fail(tmp_path: Path, steps: int) -> None:
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8))
    noise = build_image_set(tmp_path / "noise.npy", tmp_path / "set")
    events = trained(tmp_path / "run", noise, steps=steps)
    assert events[-1].step == steps
    said = [event.note for event in events if event.note and "stays above 8, which a uniform code costs" in event.note]
    assert bool(said) is (steps >= 10), "a warning, since noise costs more than a uniform code"


@pytest.mark.parametrize("validated", [True, False])
def test_the_best_checkpoint_is_from_before_and_is_kept(
    tmp_path: Path, image_set: ImageSet, monkeypatch: pytest.MonkeyPatch, validated: bool
) -> None:
    run = tmp_path / "run"
    every = 10 if validated else 1_000
    monkeypatch.setattr("flowpp.learner.learning_rate", lambda recipe, step: 1e-3 if step <= 20 else 1.0)
    with pytest.raises(TrainingError) as caught:
        trained(run, image_set, steps=80, keep_checkpoints=1, evaluation_every=every)
    assert caught.value.code == "diverged"
    kept = [path.name for path in RunDirectory(run).checkpoints()]
    assert kept[0] == "step-00000020"
    assert len(kept) == 2
    assert find_checkpoint(run).name == "step-00000020"
    marked = [row["step"] for row in RunDirectory(run).read_metrics() if DIVERGED in row]
    assert marked
    assert min(marked) > 20


def test_a_diverged_run_that_recovers_succeeds(tmp_path: Path, image_set: ImageSet, monkeypatch: Any) -> None:
    monkeypatch.setattr("flowpp.learner.learning_rate", lambda recipe, step: 0.1 if step <= 12 else 3e-3)
    events = trained(tmp_path / "run", image_set, steps=150, warmup_steps=0)
    notes = " ".join(filter(None, (event.note for event in events)))
    assert "training bits/dim stays above 8" in notes
    assert "below the 8 of a uniform code again" in notes
    assert events[-1].metrics["train_bits_per_dim"] < 8
    assert DIVERGED not in events[-1].metrics


def test_a_stopped_run_fails_at_the_step_at_which_it_would_have_failed(tmp_path: Path, image_set: ImageSet) -> None:
    model = resolve_model("tiny", {}, image_set.shape)
    recipe = resolve_training("tiny", {"steps": 20, "learning_rate": 1.0})
    run = tmp_path / "run"
    for event in train(run, model=model, training=recipe, images=image_set):
        if event.step == 13:
            break
    with pytest.raises(TrainingError) as caught:
        list(train(run))
    assert (caught.value.code, caught.value.step) == ("diverged", 20)


def test_a_run_that_was_diverged_before_its_losses_were_not_finite_says_so(
    tmp_path: Path, image_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowpp.learner.learning_rate", lambda recipe, step: 1.0 if step <= 40 else 1e38)
    with pytest.raises(TrainingError, match=r"diverged since step \d+") as caught:
        trained(tmp_path / "run", image_set, steps=200, checkpoint_every=30)
    assert caught.value.code == "diverged"
