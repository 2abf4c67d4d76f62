"""`make bench-gpu` on a CPU: every path of it with a tiny model, and what it says where it cannot measure."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import gpu, time_to_bits
from benchmarks.gpu_measures import SMOKE, Case, enlarged, fitting, inference, latencies, train
from benchmarks.images import RealImages
from benchmarks.results import RESULTS
from benchmarks.time_to_bits import Point, Run
from examples import photographs
from flowpp.learner import NonFiniteLoss
from tests.waiting import PATIENCE_SECONDS

CPU = torch.device("cpu")
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def images() -> RealImages:
    training, test = photographs.patches()
    return RealImages("photograph patches", training[:160], test[:8])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_path_runs_on_a_cpu_with_a_tiny_model_and_no_result_is_written() -> None:
    before = RESULTS.read_bytes()
    done = run("--device", "cpu", "--smoke")
    assert done.returncode == 0, done.stderr
    for heading in ("Training", "Likelihood and sampling", "One sample", "Aims", "Mixture kernels", "Time to bits/dim"):
        assert f"### {heading} (" in done.stdout
    assert "### Beside the baseline (" in done.stdout
    assert "out of memory" not in done.stdout
    assert RESULTS.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_and_has_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_figures_of_a_cpu_are_not_those_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--device", "cpu"])
    assert "measured on cuda" in capsys.readouterr().err


def test_training_is_measured_with_and_without_checkpointing(images: RealImages) -> None:
    for recompute in (False, True):
        case = Case("tiny", SMOKE.model, 2, "float32", recompute)
        found = train(case, images.training, CPU, 0.0)
        assert found.rate > 0
        assert found.peak > 0


def test_likelihood_sampling_and_one_sample_are_measured(images: RealImages) -> None:
    rates = inference(SMOKE, images.training, CPU)
    assert list(rates) == [("likelihood", 2), ("likelihood", 3), ("sampling", 2), ("sampling", 3)]
    assert all(rate and rate > 0 for rate in rates.values())
    p50, p99 = latencies(SMOKE, images.training, CPU)
    assert 0 < p50 <= p99


def test_what_does_not_fit_is_said_and_another_error_is_raised() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong() -> None:
        raise RuntimeError("shapes")

    assert fitting(too_large) is None
    assert fitting(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="shapes"):
        fitting(wrong)
    case = Case("cifar10", SMOKE.model, 2, "float32", False)
    assert gpu.training_text(SMOKE, {case: None}, CPU).endswith("| cifar10 | 2 | float32 | out of memory |  |  |  |")
    nothing = {("likelihood", 2): None, ("sampling", 2): None}
    lines = gpu.aims_text(SMOKE, {case: None}, nothing, p50=0.02).splitlines()[2:]
    assert "| training at batch 3, GB | out of memory | 16 | no |" in lines
    assert "| likelihood, images/s | out of memory | 7,500 | no |" in lines
    assert "| one sample, p50 ms | 20.0 | 10 | no |" in lines


def test_achieved_arithmetic_is_beside_the_cards_where_its_name_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: H100)
    assert gpu.achieved("training", 2_500, card) == ["194.0", "19.6"]
    assert "989 TFLOP/s" in gpu.peak_text(card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert gpu.achieved("training", 2_500, card) == ["194.0", ""]
    assert "not known" in gpu.peak_text(card)
    assert gpu.achieved("training", None, CPU) == ["", ""]


def test_large_images_are_mosaics_of_small_ones(images: RealImages) -> None:
    large = enlarged(images.training[:5], 64)
    assert large.shape == (5, 64, 64, 3)
    for place, quarter in enumerate((np.s_[:32, :32], np.s_[:32, 32:], np.s_[32:, :32], np.s_[32:, 32:])):
        assert np.array_equal(large[1][quarter], images.training[(1 + place) % 5])
    assert np.array_equal(enlarged(images.training, 32), images.training)


def test_a_run_ends_when_training_and_validation_have_come_down_to_every_target(images: RealImages) -> None:
    found = time_to_bits.train_to(
        (7.95, 7.8), SMOKE.model, SMOKE.recipe, images, CPU, window=32, seconds=PATIENCE_SECONDS
    )
    *before, last = found.points
    assert max(last.training, last.validation) <= 7.8
    assert all(max(point.training, point.validation) > 7.8 for point in before)
    assert [point.images for point in found.points] == [32 * (n + 1) for n in range(len(found.points))]
    assert [point.seconds for point in found.points] == sorted(point.seconds for point in found.points)


def test_a_run_that_no_longer_is_finite_ends_with_what_it_had(
    images: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object) -> None:
        raise NonFiniteLoss(1, "5 steps in a row were not finite")

    monkeypatch.setattr("flowpp.learner.Learner.take_step", diverge)
    found = time_to_bits.train_to((1,), SMOKE.model, SMOKE.recipe, images, CPU, window=32, seconds=PATIENCE_SECONDS)
    assert found == Run([], "5 steps in a row were not finite")
    assert "The run ended early: 5 steps in a row were not finite." in time_to_bits.report(found, (1,))


def test_each_target_has_the_first_point_that_reached_it() -> None:
    found = Run([Point(10, 1_000, 3.9, 4.0), Point(20, 2_000, 3.7, 3.8), Point(30, 3_000, 3.75, 3.7)])
    lines = time_to_bits.report(found, (3.8, 3.6)).splitlines()
    assert lines[2:6] == [
        "| 3.8, training | 20 | 2,000 |",
        "| 3.8, validation | 20 | 2,000 |",
        "| 3.6, training | not reached |  |",
        "| 3.6, validation | not reached |  |",
    ]
    assert lines[-1].startswith("At the end, after 30 s and 3,000 images: 3.750 bits/dim in training, 3.700")


def test_without_the_shards_there_is_a_line_instead_of_a_run(images: RealImages) -> None:
    text = gpu.bits_text(SMOKE._replace(real=True), images, CPU)
    assert text.startswith("Skipped: no CIFAR-10 shards")
