"""Replays of recorded passes: the numbers of the pass itself, whatever the model, the inputs and the threads."""

import copy
import ctypes
import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowpp import levels
from flowpp.conditioner import Convolution
from flowpp.config import ModelConfig
from flowpp.likelihood import estimate
from flowpp.model import FlowPP
from flowpp.program import Program
from flowpp.replay import MOST_ROWS, CannotReplay, Replay, Replays
from tests.flowpp.test_model import ABLATIONS, SMALL, random_images, trained_looking

DTYPES = (torch.float32, torch.float64)

aten = torch.ops.aten


def single(model: FlowPP) -> FlowPP:
    return copy.deepcopy(model).float().requires_grad_(False)


@pytest.fixture
def model() -> FlowPP:
    torch.manual_seed(0)
    return single(trained_looking(ModelConfig(**SMALL)))


def replaying(model: FlowPP) -> FlowPP:
    found = copy.deepcopy(model)
    found.replay()
    return found


def scored(model: FlowPP, n: int, seed: int = 0) -> Tensor:
    """[3, n]."""
    images = random_images(model.config, n)
    noise = model.draw_noise(n, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return torch.stack(model.weight_terms(images, noise))


def recordings(model: FlowPP) -> int:
    """Of passes over several rows one over a single row is recorded first."""
    assert model.replays is not None
    return model.replays.count


@contextmanager
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found: list[str] = []
        yield found
        found += [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_architecture_gives_the_same_numbers_for_other_inputs_than_were_recorded(
    ablation: str, dtype: torch.dtype, plain_or_level: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = trained_looking(ModelConfig(**{**SMALL, **ABLATIONS[ablation]})).to(dtype).requires_grad_(False)
    replayed = replaying(model)
    with warnings(caplog) as warned:
        for seed in range(3):
            torch.testing.assert_close(scored(replayed, 5, seed), scored(model, 5, seed), rtol=1e-6, atol=1e-5)
            latents = torch.randn(3, *model.config.latent_shape, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(replayed.decode(latents.to(dtype)), model.decode(latents.to(dtype)))
            images, noise = random_images(model.config, 2), model.draw_noise(2)
            found, expected = (each.encode(images, noise=noise) for each in (replayed, model))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    searched = plain_or_level == levels.PLAIN and model.config.coupling == "mixture"  # until the last element is found
    assert recordings(replayed) == (4 if searched else 6)
    assert [line.partition(" ")[0] for line in warned] == ["decode"] * searched


@pytest.mark.parametrize("n", [1, MOST_ROWS, MOST_ROWS + 1, 3 * MOST_ROWS - 1])
def test_batches_of_any_size_pass_in_parts_of_few_sizes(model: FlowPP, n: int) -> None:
    replayed = replaying(model)
    torch.testing.assert_close(scored(replayed, n), scored(model, n), rtol=1e-6, atol=1e-5)
    assert recordings(replayed) == len({1, n // (parts := -(-n // MOST_ROWS)), -(-n // parts)})


def test_no_images_are_no_pass(model: FlowPP) -> None:
    assert scored(replaying(model), 0).shape == (3, 0)


@pytest.mark.parametrize("way", ["in place", "loaded", "assigned", "other data", "plain PyTorch", "bfloat16"])
def test_a_changed_model_is_recorded_anew(model: FlowPP, way: str) -> None:
    replayed = replaying(model)
    before = scored(replayed, 2)
    with torch.no_grad():
        for each in (model, replayed):
            if way == "in place":
                for parameter in each.parameters():
                    parameter.mul_(1.01)
            elif way in ("loaded", "assigned"):
                changed = {name: 1.01 * tensor for name, tensor in each.state_dict().items()}
                each.load_state_dict(changed, assign=way == "assigned")
            elif way == "other data":
                for parameter in each.parameters():
                    parameter.data = 1.01 * parameter.data
            elif way == "plain PyTorch":
                each.fuse(False)
            else:
                each.economize(bfloat16=True)
    after = scored(replayed, 2)
    torch.testing.assert_close(after, scored(model, 2), rtol=1e-6, atol=1e-5)
    if way != "plain PyTorch":
        assert not torch.allclose(after, before, rtol=1e-6, atol=1e-5)
    assert recordings(replayed) == 2


def test_threads_compute_at_once_and_each_has_its_own_numbers(model: FlowPP) -> None:
    replayed, together = replaying(model), threading.Barrier(4, timeout=30)
    expected = [scored(model, 3, seed) for seed in range(4)]

    def score(seed: int) -> Tensor:
        together.wait()
        for _ in range(20):
            found = scored(replayed, 3, seed)
        return found

    with ThreadPoolExecutor(4) as threads:
        for found, exact in zip(threads.map(score, range(4)), expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-5)
    assert recordings(replayed) <= 5


def test_gradients_and_training_are_not_replayed(model: FlowPP) -> None:
    replayed = replaying(model)
    image = random_images(model.config, 1)
    replayed.requires_grad_()
    replayed.log_prob(image).sum().backward()
    assert all(parameter.grad is not None for parameter in replayed.parameters())
    replayed.train()
    with torch.no_grad():
        replayed.training_loss(image)
    assert recordings(replayed) == 0
    replayed.requires_grad_(False)
    assert not replayed.log_prob(image).requires_grad
    assert recordings(replayed) == 1  # there are no gradients to be had
    x = torch.zeros(1, *model.config.latent_shape, requires_grad=True)
    assert replayed.decode(x, continuous=True).requires_grad


def test_what_a_replay_gives_is_the_callers_own(model: FlowPP) -> None:
    replayed = replaying(model)
    first = scored(replayed, 2, seed=1)
    kept = first.clone()
    scored(replayed, 2, seed=2)
    assert torch.equal(first, kept)


def test_inference_mode_and_no_grad_share_recordings(model: FlowPP) -> None:
    replayed, expected = replaying(model), scored(model, 2)
    with torch.inference_mode():
        torch.testing.assert_close(scored(replayed, 2), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(scored(replayed, 2), expected, rtol=1e-6, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(scored(replayed, 2), expected, rtol=1e-6, atol=1e-5)
    assert recordings(replayed) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_makes_recordings_of_its_own(model: FlowPP, copied: Callable[[FlowPP], FlowPP]) -> None:
    replayed = replaying(model)
    before = scored(replayed, 2)
    other = copied(replayed)
    assert recordings(other) == 0
    with torch.no_grad():
        next(other.flow.parameters()).mul_(2)
    assert not torch.equal(scored(other, 2), before)
    assert torch.equal(scored(replayed, 2), before)


def test_estimates_are_the_same_with_importance_samples(model: FlowPP) -> None:
    images = random_images(model.config, 3).permute(0, 2, 3, 1).numpy()
    found, expected = (estimate(each, images, [1, 2, 3], 5) for each in (replaying(model), model))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_memory_is_used_again_within_a_pass_and_counted(model: FlowPP) -> None:
    replayed = replaying(model)
    assert replayed.replays is not None
    of_weights = sum(parameter.nbytes for parameter in model.parameters())
    assert replayed.replays.nbytes == of_weights
    scored(replayed, 1)
    first = replayed.replays.nbytes - of_weights
    scored(replayed, 2)
    second = replayed.replays.nbytes - of_weights - first
    assert 0 < second < first  # what comes of the weights alone is shared

    def deep(x: Tensor) -> tuple[Tensor]:
        for _ in range(100):
            x = x + 1
        return (x,)

    assert Replay(deep, [torch.zeros(1024)], {}).nbytes <= 3 * 4096


def test_what_depends_on_the_weights_alone_is_computed_once() -> None:
    weight = torch.eye(64) + 0.01
    calls = []

    def function(x: Tensor) -> tuple[Tensor]:
        calls.append(len(x))
        return (x @ weight.inverse() + weight.logdet(),)

    replays = Replays([weight])
    x = torch.randn(2, 64)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(replays("solve", function, x)[0], function(x)[0])
    calls.clear()
    replays("solve", function, x + 1)
    assert not calls
    weight.mul_(2)
    torch.testing.assert_close(replays("solve", function, x)[0], function(x)[0])


def depends_on_a_value(x: Tensor) -> tuple[Tensor]:
    return (x * 2 if float(x.sum()) > 0 else x * 3,)


def is_random(x: Tensor) -> tuple[Tensor]:
    return (x + torch.randn_like(x),)


def changes_a_constant(x: Tensor) -> tuple[Tensor]:
    constant = torch.zeros(3)
    constant[0] = 1
    constant += x.sum()
    return (constant.expand(len(x), 3),)


def leaves_pytorch(x: Tensor) -> tuple[Tensor]:
    return (torch.from_numpy(x.detach().numpy() + 1) + x,)


def has_results_of_any_size(x: Tensor) -> tuple[Tensor]:
    return (x[x > 0].sum().expand(len(x)),)


@pytest.mark.parametrize(
    "function", [depends_on_a_value, is_random, changes_a_constant, leaves_pytorch, has_results_of_any_size]
)
def test_what_cannot_be_replayed_is_computed_as_it_was_and_said_once(
    function: Callable[[Tensor], tuple[Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    replays, x = Replays([]), torch.tensor([[1.0, 2.0]])
    with warnings(caplog) as warned:
        replays("this", function, x)  # begins, and gives up
        torch.manual_seed(3)
        (found,) = replays("this", function, -x)
        torch.manual_seed(3)
        assert torch.equal(found, function(-x)[0])
    assert [line.startswith("this is computed without a recording: ") for line in warned] == [True]
    assert replays.count == 0


def test_a_recording_that_gives_other_numbers_than_the_pass_is_refused() -> None:
    def past_pytorch(x: Tensor) -> tuple[Tensor]:
        y = x + 1
        ctypes.memset(y.data_ptr(), 0, y.nbytes)
        return (y,)

    with pytest.raises(CannotReplay, match="other numbers"):
        Replay(past_pytorch, [torch.ones(2)], {})


def test_a_result_may_be_the_same_whatever_the_inputs() -> None:
    replay = Replay(lambda x: (torch.ones(len(x)), x + 1), [torch.zeros(2)], {})
    for _ in range(2):
        ones, more = replay(torch.full((2,), 3.0))
        assert (ones.tolist(), more.tolist()) == ([1, 1], [4, 4])
        ones.zero_()


def test_writing_into_parts_of_a_result_is_replayed() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(len(x), 4)
        out[:, :2] = x
        out[:, 2:] = x.flip(1)
        out[:, 1].mul_(3)
        return (out.sort(dim=1).values, out)

    replay = Replay(function, [torch.zeros(3, 2)], {})
    for seed in range(3):
        x = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
        for found, expected in zip(replay(x), function(x), strict=True):
            assert torch.equal(found, expected)


@pytest.fixture
def small_model() -> FlowPP:
    model = FlowPP("small").eval().requires_grad_(False)
    model.initialize(random_images(model.config, 4))
    return model


def test_most_of_a_replay_is_kernels_that_python_calls_together(level: str, small_model: FlowPP) -> None:
    """PyTorch computes the convolutions, if there are no matrix tiles, and little else."""
    convolved: list[nn.Module] = []
    for module in small_model.modules():
        if isinstance(module, Convolution):
            module.register_forward_hook(lambda module, given, found: convolved.append(module))
    scored(small_model, 1)
    convolutions = len(convolved)
    replayed = replaying(small_model)
    scored(replayed, 1)
    assert replayed.replays is not None
    ((replay,),) = replayed.replays._free.values()
    programs = [call for call in replay._calls if isinstance(call, Program)]
    kernels = sum(program._count.value for program in programs)
    operations = [call.func for call in replay._calls if isinstance(call, partial)]
    assert len(operations) + len(programs) == len(replay._calls)
    assert len(programs) <= len(operations) + 1, "kernels in a row are one call"
    of_pytorch = [each for each in operations if each.overloadpacket in (aten.convolution, aten.addmm)]
    assert len(of_pytorch) == (0 if level == "amx" else convolutions)
    assert kernels > 5 * (len(operations) - len(of_pytorch))
    assert kernels > 3 * len(of_pytorch)


class Dispatches(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches, views included."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += 1
        return function(*arguments, **(options or {}))


def dispatches(model: FlowPP) -> int:
    """Those of a pass over one image, after the first, which may record it."""
    scored(model, 1)
    with Dispatches() as dispatched:
        scored(model, 1)
    return dispatched.count


def test_a_replay_calls_pytorch_a_fraction_as_often_as_the_pass(plain_or_level: str, small_model: FlowPP) -> None:
    most = 0.75 if plain_or_level == levels.PLAIN else 0.25
    assert dispatches(replaying(small_model)) < most * dispatches(small_model)


def test_a_small_models_pass_is_sooner_replayed_than_computed(small_model: FlowPP) -> None:
    """By the processor time of this thread, however busy the machine is; both take turns."""
    model, replayed = small_model, replaying(small_model)
    best: dict[bool, float] = {}
    for turn in range(20):
        for each in (model, replayed):
            if turn == 0:
                scored(each, 1)
            start = time.thread_time()
            scored(each, 1)
            best[each is replayed] = min(best.get(each is replayed, 1e9), time.thread_time() - start)
    assert best[True] < best[False]
