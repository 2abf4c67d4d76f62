"""Convolutions and attention on the processor's matrix tiles: how far from float64, and what must not change a bit."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from flowpp import cpu_kernels, fused, levels
from flowpp.conditioner import concat_elu
from flowpp.config import ModelConfig
from flowpp.model import FlowPP
from tests.flowpp.test_model import ABLATIONS, SMALL, random_images, trained_looking
from tests.levels import left_out, levels_here

pytestmark = pytest.mark.skipif(
    "amx" not in levels_here(), reason=left_out().get("amx", "there are matrix tiles on x86-64 only")
)

NONE = (0.0, 0)
WORST = 2.0**-15
"""What a product may be off by: 2^-17 of it for each factor, 2^-16 for the lows; the sum is in float32."""
TYPICAL = 5e-6
"""Root mean square of the errors, of that of the numbers."""

SHAPES = [
    (2, 3, 3, 5, 7, 3),
    (16, 32, 16, 8, 32, 3),
    (3, 6, 8, 8, 84, 3),
    (1, 96, 4, 4, 33, 3),
    (2, 16, 32, 16, 24, 1),
    (5, 33, 9, 23, 70, 1),
    (1, 5, 1, 1, 1, 3),
    (1, 1, 1, 1, 1, 1),
    (1, 40, 9, 3, 17, 5),
    (2, 16, 9, 9, 20, 5),  # a block begins in the second column of a margin
]
"""Batch, channels, height, width, filters, kernel."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def on_tiles(x: Tensor, weight: Tensor, bias: Tensor, elu: bool) -> Tensor:
    return fused.elu_convolution(x, weight, bias, NONE) if elu else fused.convolution(x, weight, bias)


def exact(x: Tensor, weight: Tensor, bias: Tensor, elu: bool) -> Tensor:
    return conv2d(concat_elu(x) if elu else x, weight, bias, padding=weight.shape[-1] // 2)


def outcomes(convolve: Callable, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, elu: bool) -> list[Tensor]:
    """The result, and the gradients in x, weight and bias."""
    leaves = [each.detach().clone().requires_grad_() for each in (x, weight, bias)]
    out = convolve(*leaves, elu)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def given(shape: tuple[int, ...], elu: bool) -> list[Tensor]:
    """x, weight, bias and the gradient in the result."""
    batch, channels, height, width, filters, kernel = shape
    weight = 0.1 * normal(filters, channels * (1 + elu), kernel, kernel, seed=2)
    x = 2 * normal(batch, channels, height, width, seed=1)
    return [x, weight, normal(filters, seed=3), normal(batch, filters, height, width, seed=4)]


@pytest.mark.parametrize("elu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_are_those_of_float64_but_for_what_two_bfloat16s_lose(
    shape: tuple[int, ...], elu: bool
) -> None:
    inputs = given(shape, elu)
    found = outcomes(on_tiles, *inputs, elu)
    expected = outcomes(exact, *(each.double() for each in inputs), elu)
    x, weight, bias, grad = (each.double() for each in inputs)
    sizes = outcomes(exact, (concat_elu(x) if elu else x).abs(), weight.abs(), bias.abs(), grad.abs(), False)
    if elu:  # concat_elu passes on no more than all of both halves
        sizes[1] = sum(sizes[1].chunk(2, dim=1))
    for ours, right, size in zip(found, expected, sizes, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == right.shape
        assert ((ours - right).abs() <= WORST * size).all()
        if right.numel() > 1000:
            assert (ours - right).square().mean().sqrt() <= TYPICAL * right.square().mean().sqrt()


def test_with_dropout_it_convolves_what_is_left() -> None:
    x, weight, bias, grad = given((4, 32, 8, 8, 20, 3), True)
    drop = (0.25, 7)
    kept = (
        cpu_kernels.concat_elu(torch.full_like(x, 50.0), drop)[:, :32] > 0,
        cpu_kernels.concat_elu(-50 + 0 * x, drop)[:, 32:] > 0,
    )
    mask = torch.cat(kept, 1).double() / 0.75

    def reference(x: Tensor, weight: Tensor, bias: Tensor, _: bool) -> Tensor:
        return conv2d(concat_elu(x) * mask, weight, bias, padding=1)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, _: bool) -> Tensor:
        return fused.elu_convolution(x, weight, bias, drop)

    assert 0.2 < float((mask == 0).double().mean()) < 0.3
    found = outcomes(ours, x, weight, bias, grad, True)
    expected = outcomes(reference, *(each.double() for each in (x, weight, bias, grad)), True)
    for mine, right in zip(found, expected, strict=True):
        assert (mine - right).square().mean().sqrt() <= TYPICAL * right.square().mean().sqrt()


@pytest.mark.parametrize("elu", [False, True])
@pytest.mark.parametrize("shape", [(5, 32, 16, 8, 84, 3), (5, 32, 16, 8, 84, 1), (1, 16, 32, 16, 40, 3)], ids=str)
def test_neither_threads_nor_the_rest_of_the_batch_nor_memory_format_change_a_bit(
    shape: tuple[int, ...], elu: bool
) -> None:
    x, weight, bias, grad = given(shape, elu)
    expected = outcomes(on_tiles, x, weight, bias, grad, elu)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for ours, same in zip(outcomes(on_tiles, x, weight, bias, grad, elu), expected, strict=True):
                assert torch.equal(ours, same)
    finally:
        torch.set_num_threads(before)
    turned = [each.transpose(2, 3).contiguous().transpose(2, 3) for each in (x, weight, grad)]
    for ours, same in zip(outcomes(on_tiles, turned[0], turned[1], bias, turned[2], elu), expected, strict=True):
        assert torch.equal(ours, same)
    for i in range(len(x)):
        alone = outcomes(on_tiles, x[i : i + 1], weight, bias, grad[i : i + 1], elu)
        assert torch.equal(alone[0][0], expected[0][i])
        assert torch.equal(alone[1][0], expected[1][i])


def attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(softmax attention, the logarithms of its sums [B, heads, length]) by PyTorch."""
    q, k, v = qkv.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out.unflatten(1, qkv.shape[2:]).permute(0, 3, 1, 2), scores.logsumexp(-1)


def off(ours: Tensor, right: Tensor) -> float:
    return float((ours - right).square().mean().sqrt() / right.square().mean().sqrt())


def queries_keys_values(heads: int, size: int, batch: int, height: int, width: int, *, score: float) -> Tensor:
    """With scores of about that standard deviation, and values of 1."""
    qkv = normal(batch, 3 * heads * size, height, width, seed=size)
    qkv[:, : 2 * heads * size] *= score**0.5
    return qkv.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [16, 24, 26, 32])
@pytest.mark.parametrize("positions", [(8, 16), (16, 16), (7, 19), (1, 1031)], ids=str)
@pytest.mark.parametrize("score", [0.1, 1.0, 3.0, 8.0, 60.0])
def test_attention_has_the_scores_of_float32_and_values_as_two_bfloat16s(
    size: int, positions: tuple[int, int], score: float
) -> None:
    qkv = queries_keys_values(2, size, 2, *positions, score=score)
    expected, expected_sums = attention(qkv.double(), 2)
    found, sums = cpu_kernels.attention(qkv, 2, NONE)
    with levels.at("avx512"):
        plain, plain_sums = cpu_kernels.attention(qkv, 2, NONE)
    assert not torch.equal(found, plain)
    assert off(found, expected) <= TYPICAL + 2 * off(plain, expected)
    assert (sums - expected_sums).abs().max() <= 2e-6 + 4 * (plain_sums - expected_sums).abs().max()


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("least", [-10.0, -26.0, -36.0])
def test_attention_is_as_exact_where_all_scores_are_as_low_as_they_can_be(size: int, least: float) -> None:
    """Every query points away from every key: up to some score the tiles take weights from what scores could be."""
    qkv = queries_keys_values(1, size, 1, 8, 17, score=0.1)
    away = torch.nn.functional.normalize(torch.ones(size), dim=0) * (-least * size**0.5) ** 0.5
    qkv[:, :size] -= away[:, None, None]
    qkv[:, size : 2 * size] += away[:, None, None]
    expected, expected_sums = attention(qkv.double(), 1)
    found, sums = cpu_kernels.attention(qkv, 1, NONE)
    with levels.at("avx512"):
        plain, plain_sums = cpu_kernels.attention(qkv, 1, NONE)
    assert off(found, expected) <= TYPICAL + 2 * off(plain, expected)
    assert (sums - expected_sums).abs().max() <= 2e-6 + 4 * (plain_sums - expected_sums).abs().max()


def test_attention_sees_every_key_and_no_other_image_or_head() -> None:
    """A value of its own for each key, where each query looks at one: they are all found where they belong."""
    batch, heads, size, length = 2, 3, 32, 133
    where = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    keys = torch.nn.functional.normalize(normal(6, length, size, seed=1), dim=2) * 40
    queries = torch.stack([key[at] for key, at in zip(keys, where, strict=True)])
    values = torch.arange(6 * length * size).view(6, length, size).float()
    qkv = torch.stack([queries, keys, values]).unflatten(1, (batch, heads))  # [3, batch, heads, length, size]
    qkv = qkv.permute(1, 0, 2, 4, 3).reshape(batch, 3 * heads * size, 7, 19).contiguous()
    found, _ = cpu_kernels.attention(qkv.contiguous(memory_format=torch.channels_last), heads, NONE)
    expected = torch.stack([value[at] for value, at in zip(values, where, strict=True)])
    expected = expected.unflatten(0, (batch, heads)).transpose(2, 3).reshape(batch, heads * size, 7, 19)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.01)


def test_attention_drops_what_the_backward_pass_takes_for_dropped() -> None:
    qkv = queries_keys_values(2, 24, 3, 16, 16, score=1.0)
    whole, _ = cpu_kernels.attention(qkv, 2, NONE)
    dropped, _ = cpu_kernels.attention(qkv, 2, (0.25, 7))
    kept = cpu_kernels.concat_elu(torch.full((3, 24, 16, 16), 50.0), (0.25, 7))  # of as many features: the same places
    assert 0.2 < float((dropped == 0).double().mean()) < 0.3
    assert torch.equal((dropped != 0)[:, :24], kept[:, :24] > 0)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, whole / 0.75), rtol=1e-6, atol=1e-7)


def test_attentions_gradients_are_those_of_float64() -> None:
    qkv = queries_keys_values(2, 24, 2, 16, 16, score=2.0)
    grad = normal(2, 48, 16, 16, seed=5)
    ours, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    (found,) = torch.autograd.grad(fused.attention(ours, 2, NONE), ours, grad)
    (expected,) = torch.autograd.grad(attention(exact, 2)[0], exact, grad.double())
    assert (found - expected).square().mean().sqrt() <= TYPICAL * expected.square().mean().sqrt()


def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit_of_attention() -> None:
    qkv = queries_keys_values(3, 16, 5, 9, 23, score=2.0)
    expected, _ = cpu_kernels.attention(qkv, 3, NONE)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(cpu_kernels.attention(qkv, 3, NONE)[0], expected)
    finally:
        torch.set_num_threads(before)
    for i in range(5):
        alone, _ = cpu_kernels.attention(qkv[i : i + 1].contiguous(memory_format=torch.channels_last), 3, NONE)
        assert torch.equal(alone[0], expected[i])


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_attention_of_what_is_no_number_is_none_where_it_is_looked_at(part: str) -> None:
    qkv = queries_keys_values(1, 16, 2, 8, 16, score=1.0)
    qkv[0, 16 * ["query", "key", "value"].index(part) + 3, 2, 5] = math.nan
    found, _ = cpu_kernels.attention(qkv, 1, NONE)
    wrong = torch.zeros(2, 16, 8, 16, dtype=torch.bool)
    if part == "query":
        wrong[0, :, 2, 5] = True
    elif part == "key":
        wrong[0] = True
    else:
        wrong[0, 3] = True
    assert torch.equal(found.isnan(), wrong)


def test_the_least_and_the_greatest_numbers_keep_their_size() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 80, -80, 1e4, -1e4, 3e38, -3e38])[None, :, None, None]
    found = fused.convolution(x, torch.eye(12)[:, :, None, None], torch.zeros(12))
    torch.testing.assert_close(found, x, rtol=2.0**-17, atol=0)


def test_what_is_no_number_stays_none_and_stays_where_it_is() -> None:
    x = torch.zeros(2, 16, 6, 6)
    x[0, 3, 2, 2] = math.nan
    for elu in (False, True):
        found = on_tiles(x, torch.ones(5, 16 * (1 + elu), 3, 3), torch.zeros(5), elu)
        wrong = torch.zeros(2, 5, 6, 6, dtype=torch.bool)
        wrong[0, :, 1:4, 1:4] = True
        assert torch.equal(found.isnan(), wrong)


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_model_gives_the_bits_per_dim_of_float32_and_every_image_back(name: str) -> None:
    torch.manual_seed(1)  # of 60 seeds one, 0, makes a grey model of 16 pixels that is off by 2.6e-5
    model = trained_looking(ModelConfig(**SMALL | ABLATIONS[name])).float().eval()
    images = random_images(model.config, 8)
    noise = model.draw_noise(len(images), torch.Generator().manual_seed(3))

    def measured(model: FlowPP) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            nats = model.log_prob(images, noise=noise.to(next(model.parameters())))
            back = model.decode(model.encode(images, noise=noise.to(next(model.parameters()))))
        return -nats.double() / (math.log(2) * model.config.dimensions), back

    ours, back = measured(model)
    right, _ = measured(deepcopy(model).double())
    assert (ours - right).abs().max() <= 2e-5
    assert torch.equal(back, images)
    with levels.at("avx512"):
        plain, _ = measured(model)
    assert (plain - right).abs().max() <= 2e-5
    assert not torch.equal(ours, plain)


_REFUSED = """
import ctypes, torch
from flowpp import cpu_kernels, fused, levels
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(1 << 16)
size = 4096  # the state of the tiles, which a signal's handler would find on it, takes 8 KiB
libc = ctypes.CDLL(None, use_errno=True)
assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, size)), None) == 0, ctypes.get_errno()
print(cpu_kernels.has_tiles(torch.float32))
print(levels.lacking()["amx"][:21])
print(fused.convolution(torch.ones(1, 2, 1, 1), torch.ones(3, 2, 1, 1), torch.zeros(3)).flatten().tolist())
"""


def test_where_linux_refuses_them_models_go_without() -> None:
    environment = {name: value for name, value in os.environ.items() if name != levels.VARIABLE}
    command = [sys.executable, "-c", _REFUSED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert run.stdout.splitlines() == ["False", "Linux does not permit", "[2.0, 2.0, 2.0]"], run.stderr
