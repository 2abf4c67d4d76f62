"""Copies and arithmetic as kernels: PyTorch's numbers, bit for bit, however tensors lie; and programs of kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowpp.elementwise import as_kernels
from flowpp.program import BoundKernel, in_programs

aten = torch.ops.aten

DTYPES = (torch.float32, torch.float64)

pytestmark = pytest.mark.usefixtures("level")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "contiguous": lambda dtype: numbers(2, 6, 5, 7, dtype=dtype),
    "channels last": lambda dtype: numbers(2, 6, 5, 7, dtype=dtype).contiguous(memory_format=torch.channels_last),
    "every other": lambda dtype: numbers(2, 12, 5, 14, dtype=dtype)[:, ::2, :, ::2],
    "one for all channels": lambda dtype: numbers(2, 1, 5, 7, dtype=dtype),
    "one for each channel": lambda dtype: numbers(6, 1, 1, dtype=dtype),
    "one": lambda dtype: numbers(1, dtype=dtype),
    "turned": lambda dtype: numbers(7, 5, 6, 2, dtype=dtype).permute(3, 2, 1, 0),
}


def computed(function: Any, *arguments: Any, like: Tensor) -> Tensor:
    """What the kernels write into a tensor that lies as `like`."""
    out = torch.full_like(like, float("nan"))
    calls = as_kernels(function, arguments, {}, [out])
    assert calls is not None
    for call in in_programs(calls):
        call()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor])
@pytest.mark.parametrize("second", [*LAYOUTS, 3, -0.1])
@pytest.mark.parametrize("first", LAYOUTS)
def test_arithmetic_gives_pytorchs_numbers(first: str, second: Any, function: Any, dtype: torch.dtype) -> None:
    a = LAYOUTS[first](dtype)
    b = LAYOUTS[second](dtype).flip(0) if isinstance(second, str) else second
    expected = function(a, b)
    for like in (expected, expected.transpose(0, -1).contiguous().transpose(0, -1)):
        assert torch.equal(computed(function, a, b, like=like), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_negatives_and_squares_are_pytorchs(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](dtype)
    assert torch.equal(computed(aten.clone.default, x, like=x), x)
    assert torch.equal(computed(aten.clone.default, x, like=x.contiguous()), x)
    assert torch.equal(computed(aten.neg.default, x, like=x), -x)
    assert torch.equal(computed(aten.pow.Tensor_Scalar, x, 2, like=x), x**2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimension", [0, 1, 3, -1])
def test_tensors_are_put_side_by_side(dimension: int, dtype: torch.dtype) -> None:
    one, other = LAYOUTS["channels last"](dtype), LAYOUTS["contiguous"](dtype)
    parts = [one, other, one.narrow(dimension, 1, 1)]
    expected = torch.cat(parts, dimension)
    for like in (expected, expected.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(computed(aten.cat.default, parts, dimension, like=like), expected)
    expected = torch.stack([one, other], dimension)
    assert torch.equal(computed(aten.stack.default, [one, other], dimension, like=expected), expected)
    assert torch.equal(computed(aten.cat.default, [one, other], like=torch.cat([one, other])), torch.cat([one, other]))


def test_what_is_no_number_and_what_is_infinite_are_as_pytorch_has_them() -> None:
    special = torch.tensor([0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3e38])
    a, b = special[:, None].expand(8, 8), special[None, :].expand(8, 8)
    for function in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        expected = function(a, b)
        found = computed(function, a, b, like=expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.parametrize("shape", [(1 << 18,), (3, 1 << 16), (1 << 16, 3), (1,), (0,)])
def test_threads_share_what_is_large(shape: tuple[int, ...]) -> None:
    a, b, threads = numbers(*shape), numbers(*shape, seed=1), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(computed(aten.add.Tensor, a, b, like=a), a + b)
            strided = numbers(*shape, 2)[..., 0]
            assert torch.equal(computed(aten.mul.Tensor, strided, b, like=a), strided * b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (aten.add.Tensor, (numbers(3), numbers(3)), {"alpha": 2}),
        (aten.add.Tensor, (numbers(3), numbers(3).double()), {}),
        (aten.add.Tensor, (numbers(3), torch.arange(3)), {}),
        (aten.mul.Tensor, (numbers(3), True), {}),
        (aten.pow.Tensor_Scalar, (numbers(3), 3), {}),
        (aten.cat.default, ([numbers(3, 2), numbers(0)],), {}),
        (aten._to_copy.default, (numbers(3).bfloat16(),), {}),
        (aten.exp.default, (numbers(3),), {}),
        (aten.neg.default, (numbers(*[2] * 9).permute(0, 8, 1, 7, 2, 6, 3, 5, 4),), {}),
    ],
)
def test_what_the_kernel_does_not_do_is_left_to_pytorch(
    function: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    found = function(*arguments, **options)
    out = torch.empty(found.shape)  # contiguous float32, whatever PyTorch gives
    assert as_kernels(function, arguments, options, [out]) is None


def test_integers_are_left_to_pytorch() -> None:
    assert as_kernels(aten.add.Tensor, (torch.arange(3), 1), {}, [torch.arange(3)]) is None


def test_kernels_that_follow_one_another_are_one_call_and_others_keep_their_place() -> None:
    x, said = torch.ones(4), list[list[float]]()
    (double,) = as_kernels(aten.add.Tensor, (x, x), {}, [x]) or []
    (of_others,) = as_kernels(aten.add.Tensor, (x.double(), 1), {}, [x.double()]) or []
    assert isinstance(double, BoundKernel)
    calls = in_programs([double, double, lambda: said.append(x.tolist()), double, of_others, double])
    assert len(calls) == 5
    for call in calls:
        call()
    assert said == [[4.0] * 4]
    assert x.tolist() == [16.0] * 4
    assert in_programs([]) == []
