"""Lanes: parts of a batch side by side give what one pass gives, and nothing of it is left to chance."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flowpp.config import ModelConfig
from flowpp.data import ImageSet
from flowpp.lanes import MOST, side_by_side
from flowpp.learner import Learner
from flowpp.likelihood import estimate, to_symbols
from flowpp.model import FlowPP
from flowpp.presets import resolve_model, resolve_training
from flowpp.processes import Processes
from flowpp.sampling import images_of_latents, latent_of_seed
from flowpp.weights import load_model
from tests.waiting import PATIENCE_SECONDS

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("number", "n", "lanes"), [(1, 5, 1), (2, 5, 2), (2, 1, 1), (3, 7, 3), (4, 9, 4), (4, 3, 2), (6, 7, 3), (2, 0, 1)]
)
def test_the_parts_cover_all_in_order_and_share_the_threads(
    number: int, n: int, lanes: int, threads: Callable[[int], None]
) -> None:
    threads(number)
    found = side_by_side(lambda part: (list(range(n))[part], torch.get_num_threads(), threading.get_ident()), n, CPU)
    assert len(found) == lanes <= MOST
    assert [index for part, _, _ in found for index in part] == list(range(n))
    assert max(len(part) for part, _, _ in found) - min(len(part) for part, _, _ in found) <= 1
    assert {inside for _, inside, _ in found} == {number // lanes}
    assert len({lane for _, _, lane in found}) <= lanes
    assert torch.get_num_threads() == number


def test_lanes_pass_at_the_same_time(threads: Callable[[int], None]) -> None:
    threads(2)
    together = threading.Barrier(2, timeout=PATIENCE_SECONDS)
    assert sorted(side_by_side(lambda part: together.wait(), 2, CPU)) == [0, 1]


def test_other_devices_have_one_lane(threads: Callable[[int], None]) -> None:
    threads(2)
    assert side_by_side(lambda part: part, 6, torch.device("meta")) == [slice(0, 6)]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_enabled_as_they_are_for_the_caller(
    enabled: bool, number: int, threads: Callable[[int], None]
) -> None:
    threads(number)
    parameter = torch.ones(4, requires_grad=True)
    with torch.set_grad_enabled(enabled):
        found = side_by_side(lambda part: (2 * parameter[part]).requires_grad, 4, CPU)
    assert set(found) == {enabled}


def test_an_exception_reaches_the_caller_after_all_lanes_have_ended(threads: Callable[[int], None]) -> None:
    threads(2)
    ended = []

    def work(part: slice) -> None:
        if part.start == 0:
            raise ValueError("the first lane's")
        time.sleep(0.2)
        ended.append(part.start)

    with pytest.raises(ValueError, match="the first lane's"):
        side_by_side(work, 4, CPU)
    assert ended == [2]
    assert torch.get_num_threads() == 2
    assert side_by_side(lambda part: part.start, 4, CPU) == [0, 2], "the lanes serve again"


def test_threads_that_come_after_lanes_begin_with_the_callers_number(threads: Callable[[int], None]) -> None:
    threads(2)
    side_by_side(lambda part: None, 2, CPU)
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


def test_lanes_take_up_a_new_number_of_threads(threads: Callable[[int], None]) -> None:
    for number, inside in ((2, [1, 1]), (4, [1] * 4), (2, [1, 1]), (1, [1]), (6, [2] * 3)):
        threads(number)
        assert side_by_side(lambda part: torch.get_num_threads(), 8, CPU) == inside


def test_two_callers_do_not_wait_for_each_other(threads: Callable[[int], None]) -> None:
    """As when a worker's thread samples while another evaluates: all four lanes meet."""
    threads(2)
    together = threading.Barrier(4, timeout=PATIENCE_SECONDS)
    found: list[list[int]] = []

    def call() -> None:
        torch.set_num_threads(2)
        found.append(side_by_side(lambda part: together.wait(), 2, CPU))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(index for indices in found for index in indices) == [0, 1, 2, 3]


def test_a_lane_can_have_lanes_of_its_own(threads: Callable[[int], None]) -> None:
    threads(2)
    found = side_by_side(lambda part: side_by_side(lambda inner: inner.stop, part.stop - part.start, CPU), 5, CPU)
    assert found == [[2], [3]]


@pytest.fixture
def model(finished_run: Path) -> FlowPP:
    return load_model(FlowPP, finished_run / "checkpoints" / "step-00000020", "cpu")


@pytest.mark.parametrize("importance_samples", [1, 3])
def test_a_likelihood_is_the_same_for_any_number_of_threads(
    importance_samples: int, model: FlowPP, image_set: ImageSet, threads: Callable[[int], None]
) -> None:
    """To 1e-5 of the numbers and 0.001 nats, which is what float32 leaves of the sums."""
    images, seeds = image_set.images[:7], list(range(7))
    found = []
    for number in (1, 2):
        threads(number)
        found.append(estimate(model, images, seeds, importance_samples, batch_size=16))
    np.testing.assert_allclose(found[1][:, [0, 3, 4, 5]], found[0][:, [0, 3, 4, 5]], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found[1][:, 1:3], found[0][:, 1:3], atol=1e-2)


def test_samples_are_the_same_for_any_number_of_threads(model: FlowPP, threads: Callable[[int], None]) -> None:
    """But for a value that rounding carries over an integer: at most 1 in 1,000, by 1."""
    latents = torch.cat([latent_of_seed(model, seed) for seed in range(9)])
    found = []
    for number in (1, 2, 2):
        threads(number)
        found.append(images_of_latents(model, latents).astype(int))
    assert np.array_equal(found[1], found[2])
    difference = np.abs(found[0] - found[1])
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


def stepped(
    config: ModelConfig, image_set: ImageSet, steps: int, dtype: torch.dtype = torch.float32, **recipe: object
) -> dict[str, Tensor]:
    training = resolve_training("tiny", recipe)
    learner = Learner(config, training, Processes(0, 1, CPU))
    learner.model.to(dtype)
    learner.ema.to(dtype)
    learner.initialize(to_symbols(image_set.images[:16], learner.model))
    for step in range(steps):
        first = step * training.batch_size
        learner.take_step(to_symbols(image_set.images[first : first + training.batch_size], learner.model))
    return learner.model.state_dict()


@pytest.mark.parametrize("recipe", [{"micro_batch_size": 3}, {"activation_checkpointing": True}, {"compile": False}])
def test_steps_in_two_lanes_repeat_bit_for_bit_with_dropout(
    recipe: dict, image_set: ImageSet, threads: Callable[[int], None]
) -> None:
    threads(2)
    config = resolve_model("tiny", {"dropout": 0.2}, image_set.shape)
    first, again = (stepped(config, image_set, 2, **recipe) for _ in range(2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_in_two_lanes_is_the_step_in_one_but_for_rounding(
    fused: bool, image_set: ImageSet, threads: Callable[[int], None]
) -> None:
    """In float64, to 1e-9: Adam divides by the gradients' own size, and so keeps their relative rounding."""
    config = resolve_model("tiny", {}, image_set.shape)
    found = []
    for number in (1, 2):
        threads(number)
        found.append(stepped(config, image_set, 3, torch.float64, compile=fused))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-9, atol=1e-9)
    assert any(not torch.equal(found[1][name], tensor) for name, tensor in found[0].items()), "it did pass in two"


def test_the_gradients_of_lanes_are_summed_and_laid_out_as_their_parameters(
    image_set: ImageSet, threads: Callable[[int], None]
) -> None:
    threads(2)
    learner = Learner(resolve_model("tiny", {}, image_set.shape), resolve_training("tiny", {}), Processes(0, 1, CPU))
    learner.initialize(to_symbols(image_set.images[:16], learner.model))
    learner.take_step(to_symbols(image_set.images[:8], learner.model))
    for parameter in learner.model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride()


def test_an_error_in_a_lane_ends_the_step(image_set: ImageSet, threads: Callable[[int], None]) -> None:
    threads(2)
    learner = Learner(resolve_model("tiny", {}, image_set.shape), resolve_training("tiny", {}), Processes(0, 1, CPU))
    learner.initialize(to_symbols(image_set.images[:16], learner.model))
    wrong = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"the model takes"):
        learner.take_step(wrong)
    assert torch.get_num_threads() == 2
