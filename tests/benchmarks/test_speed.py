"""`make bench` on a tiny model: what it measures, and what it refuses to."""

import numpy as np
import pytest
import torch

from benchmarks.contenders import Baseline, Flowpp, disagreement, interleave_calls, without_kernels
from benchmarks.speed import BFLOAT16, CPU, EAGER, OURS, PLAIN, Measured, Row, Size, build, measure, report
from examples import photographs
from flowpp.conditioner import EluConvolution
from flowpp.presets import PRESETS

AIMS = {"training": 0.0001, "likelihood": 0.0001, "sampling": 1e6, "memory": 0.0001}
TINY = Size("tiny", PRESETS["tiny"].model, 2, AIMS, bfloat16=True)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.ascontiguousarray(photographs.patches()[0][:40])


def test_a_table_says_what_was_measured_and_what_was_reached(images: np.ndarray) -> None:
    parts: list[None] = []
    found = measure(TINY, images, lambda: parts.append(None), dict.fromkeys(AIMS, 0.0))
    assert len(parts) == 4
    assert found.disagreement < 1e-4
    assert [row.measure for row in found.rows] == [
        "training",
        "training, bfloat16",
        "likelihood",
        "sampling",
        "sampling beside our likelihood",
        "memory of training, GiB",
    ]
    for row in found.rows:
        assert row.first > 0
        assert row.second > 0
    timed = [row for row in found.rows if row.spread]
    assert len(timed) == 4
    for row in timed:
        assert row.spread is not None
        assert row.spread[0] * 0.999 <= row.ratio <= row.spread[1] * 1.001, "a ratio of medians lies among the ratios"
    text = report([found], "patches")
    assert "`tiny` in batches of 2" in text
    (sampling,) = (line for line in text.splitlines() if line.startswith("| tiny | sampling |"))
    assert sampling.endswith("| 1e+06 | no |")
    (training,) = (line for line in text.splitlines() if line.startswith("| tiny | training |"))
    assert training.endswith("| 0.0001 | yes |")


def test_the_table_shows_ratio_spread_and_aim() -> None:
    rows = [Row("training", 2.0, 5.0, 2.5, 2, (2.25, 2.75), 3.0), Row("training, bfloat16", 2.0, 1.0, 0.5)]
    lines = report([Measured(TINY, 1e-7, 0.0, rows)], "patches").splitlines()
    assert lines[-2] == "| tiny | training | 2.00 | 3.00 | 5.00 | 2.50 | 2.25 to 2.75 | 2 | yes |"
    assert lines[-1] == "| tiny | training, bfloat16 | 2.00 |  | 1.00 | 0.50 |  |  |  |"


def test_all_contenders_are_one_function(images: np.ndarray) -> None:
    contenders = build(TINY, images)
    assert list(contenders) == [PLAIN, OURS, EAGER, BFLOAT16]
    for contender in contenders.values():
        assert disagreement(contender, contenders[PLAIN]) < 1e-4
        assert contender.sample().shape == (2, 32, 32, 3)
        assert (contender.sample() == contenders[PLAIN].sample()).mean() > 0.99


def test_without_kernels_no_part_has_any(images: np.ndarray) -> None:
    eager, ours = (build(TINY, images)[name] for name in (EAGER, OURS))
    assert isinstance(eager, Flowpp)
    assert isinstance(ours, Flowpp)
    for contender, fused in ((eager, False), (ours, True)):
        for model in (contender.learner.model, contender.learner.ema):
            assert {module.fused for module in model.modules() if isinstance(module, EluConvolution)} == {fused}
    assert without_kernels(ours.learner) is ours.learner


def test_a_step_of_either_moves_the_weights(images: np.ndarray) -> None:
    contenders = build(TINY, images)
    plain, ours = contenders[PLAIN], contenders[OURS]
    assert isinstance(plain, Baseline)
    assert isinstance(ours, Flowpp)
    for contender, model in ((plain, plain.model), (ours, ours.learner.model)):
        before = [parameter.clone() for parameter in model.parameters()]
        contender.train()
        moved = [(a - b).abs().max().item() for a, b in zip(before, model.parameters(), strict=True)]
        assert 0 < max(moved) < 1e-4


def test_two_functions_are_not_compared(images: np.ndarray) -> None:
    contenders = build(TINY, images)
    plain = contenders[PLAIN]
    assert isinstance(plain, Baseline)
    with torch.no_grad():
        for parameter in plain.model.parameters():
            parameter.mul_(1.01)
    with pytest.raises(ValueError, match="the log-likelihoods differ by"):
        disagreement(contenders[OURS], plain)
    with torch.no_grad():
        next(plain.model.flow.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="differ by nan"):
        disagreement(contenders[OURS], plain)


def test_calls_take_turns_after_a_round_that_does_not_count() -> None:
    said: list[str] = []
    times = interleave_calls([lambda: said.append("a"), lambda: said.append("b")], 0.0, CPU)
    assert "".join(said) == "abababab"
    assert times.shape == (3, 2)
    assert (times >= 0).all()
