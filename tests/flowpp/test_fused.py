"""The fused kernels on the CPU against plain PyTorch: values, gradients, the coupling's inverse and its extremes."""

import logging
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, glu, layer_norm, scaled_dot_product_attention

from flowpp import cpu_kernels, fused
from flowpp.conditioner import GatedAttention, Layers, concat_elu
from flowpp.config import HEAD_SIZES, ModelConfig
from flowpp.logistic import mixture_logit, solve
from flowpp.model import FlowPP
from flowpp.native import REALS, kernels
from tests.flowpp.test_model import ABLATIONS, SMALL, random_images, trained_looking

NONE = (0.0, 0)
LAYOUTS = ("contiguous", "channels last", "every second", "turned")
DTYPES = tuple(REALS)
DOUBLE = {"rtol": 1e-11, "atol": 1e-11}
SINGLE = 4e-6
"""What float32 may be off beside plain PyTorch's own rounding, over 1 + the size of the number."""

pytestmark = pytest.mark.skipif(kernels(torch.float32) is None, reason="no C++ compiler")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of [B, C, H, W] that lies so in memory."""
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "every second":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "turned" else x.contiguous()


def outcomes(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
    """What a function gives, and the gradients of all its inputs under fixed cotangents."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = function(*leaves)
    values = found if isinstance(found, tuple) else (found,)
    cotangents = [normal(*value.shape, seed=9 + i).to(value.dtype) for i, value in enumerate(values)]
    return [*(value.detach() for value in values), *torch.autograd.grad(values, leaves, cotangents)]


def off(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).abs() / (1 + exact.abs())).max())


def assert_alike(function: Callable, reference: Callable, *inputs: Tensor) -> None:
    """Inputs are float64. In float32, no more than four times as far from float64 as plain PyTorch is, and `SINGLE`."""
    expected = outcomes(reference, list(inputs))
    for found, exact in zip(outcomes(function, list(inputs)), expected, strict=True):
        torch.testing.assert_close(found, exact, **DOUBLE)
    single = [x.float() for x in inputs]
    exactly = outcomes(reference, [x.double() for x in single])
    plain = outcomes(reference, single)
    for found, unfused, exact in zip(outcomes(function, single), plain, exactly, strict=True):
        assert found.dtype == torch.float32
        assert found.shape == exact.shape
        assert off(found, exact) <= 4 * off(unfused, exact) + SINGLE


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, whatever the processor: what they are on its matrix tiles is in test_tiles.py."""
    monkeypatch.setattr(cpu_kernels, "has_tiles", lambda dtype: False)


@pytest.mark.usefixtures("without_tiles")
@pytest.mark.parametrize("filters", [1, 5, 8, 24, 33])
@pytest.mark.parametrize("kernel", [1, 3])
def test_elu_convolution_is_the_convolution_of_concat_elu(filters: int, kernel: int) -> None:
    for layout, (batch, height, width) in zip(LAYOUTS, [(2, 3, 5), (1, 4, 4), (3, 1, 2), (1, 1, 1)], strict=True):
        x = laid_out(3 * normal(batch, filters, height, width, seed=1), layout)
        weight, bias = normal(7, 2 * filters, kernel, kernel, seed=2), normal(7, seed=3)
        assert_alike(
            lambda x, weight, bias: fused.elu_convolution(x, weight, bias, NONE),
            lambda x, weight, bias, padding=kernel // 2: conv2d(concat_elu(x), weight, bias, padding=padding),
            *(x, weight, bias),
        )


@pytest.mark.usefixtures("without_tiles")
def test_elu_convolution_keeps_steep_and_flat_ends() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 80, -80, 1e4, -1e4, 3e38, -3e38])[None, :, None, None]
    identity = torch.eye(24)[:, :, None, None]
    found, _, _ = fused.elu_convolution(x, identity, torch.zeros(24), NONE).split([12, 10, 2], dim=1)
    torch.testing.assert_close(found, concat_elu(x)[:, :12], rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(
        fused.elu_convolution(x.requires_grad_(), identity, torch.zeros(24), NONE).sum(), x
    )
    assert gradient.isfinite().all()


@pytest.mark.parametrize("filters", [1, 5, 8, 24, 33])
@pytest.mark.parametrize("with_gain", [True, False])
def test_gate_norm_is_glu_residual_and_layer_norm(filters: int, with_gain: bool) -> None:
    def reference(x: Tensor, gates: Tensor, gain: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        x = x + glu(gates, dim=1)
        if gain is None:
            return x
        return layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], gain, bias, eps=1e-5).permute(0, 3, 1, 2)

    for layout, (batch, height, width) in zip(LAYOUTS, [(2, 3, 5), (1, 4, 4), (3, 1, 2), (1, 1, 1)], strict=True):
        x = laid_out(normal(batch, filters, height, width, seed=1), layout)
        gates = laid_out(2 * normal(batch, 2 * filters, height, width, seed=2), layout)
        parameters = [normal(filters, seed=3), normal(filters, seed=4)] if with_gain else []
        given = (
            (lambda *inputs: fused.gate_norm(*inputs)) if with_gain else lambda x, g: fused.gate_norm(x, g, None, None)
        )
        assert_alike(given, reference, x, gates, *parameters)


def test_gates_far_open_and_far_closed_stay_exact() -> None:
    b = torch.tensor([-1e4, -100, -88, -20, 0, 20, 100, 1e4])[None, :, None, None].requires_grad_()
    a = torch.full_like(b, 2.0)
    x = torch.zeros_like(b)
    found = fused.gate_norm(x, torch.cat([a, b], 1), None, None)
    torch.testing.assert_close(found, 2 * b.sigmoid(), rtol=1e-6, atol=1e-30)
    (gradient,) = torch.autograd.grad(found.sum(), b)
    torch.testing.assert_close(gradient, 2 * b.sigmoid() * (1 - b.sigmoid()), rtol=1e-6, atol=1e-6)


def softmax_attention(qkv: Tensor, heads: int) -> Tensor:
    batch, _, height, width = qkv.shape
    q, k, v = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out = ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return out.transpose(1, 2).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", sorted(HEAD_SIZES))
def test_attention_is_softmax_attention_for_all_sizes_of_heads(size: int) -> None:
    """Lengths below, at and beside whole lanes, and beyond a tile of 64 keys."""
    shapes = [(2, 3, 5), (1, 4, 4), (1, 9, 9), (2, 1, 1)]
    for layout, (batch, height, width), heads in zip(LAYOUTS, shapes, (1, 2, 1, 3), strict=True):
        qkv = laid_out(1.5 * normal(batch, 3 * heads * size, height, width, seed=size), layout)
        assert_alike(
            lambda qkv, heads=heads: fused.attention(qkv, heads, NONE),
            lambda qkv, heads=heads: softmax_attention(qkv, heads),
            qkv,
        )


@pytest.mark.parametrize("size", [5, 6])
def test_heads_without_a_kernel_are_computed_by_pytorch(size: int) -> None:
    assert size not in HEAD_SIZES
    torch.manual_seed(0)
    layers = Layers(2 * size, heads=2, dropout=0.0, attention="softmax", weight_norm=False)
    attention = GatedAttention(layers).double()
    x, position = normal(1, 2 * size, 3, 5, seed=1), normal(2 * size, 3, 5, seed=2)
    expected = attention.proj_gate.filter().flatten(1) @ softmax_attention(attention.proj_in(x + position), 2).flatten(
        2
    )
    with torch.no_grad():
        attention.proj_gate.bias.fill_(0.5)
    torch.testing.assert_close(attention(x, position).flatten(2), expected + 0.5, **DOUBLE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [80, 1e4])
def test_large_scores_do_not_overflow(score: float, dtype: torch.dtype) -> None:
    """With the greatest score in the first, a middle and the last key, of two tiles."""
    length, size = 70, 8
    queries, keys, values = (normal(length, size, seed=i) for i in range(3))
    queries[:, 0], keys[:, 0] = 8**0.5, -score
    for greatest in (0, 40, 69):
        keys[greatest, 0] = score
        qkv = torch.cat([queries, keys, values], 1).T.reshape(1, 3 * size, 7, 10).to(dtype)
        found = outcomes(lambda qkv: fused.attention(qkv, 1, NONE), [qkv])
        for value, expected in zip(found, outcomes(lambda qkv: softmax_attention(qkv, 1), [qkv.double()]), strict=True):
            assert off(value, expected) < score * 8 * torch.finfo(dtype).eps + 1e-5 * (dtype == torch.float32)
        keys[greatest, 0] = -score


def test_equal_keys_share_the_attention_alike() -> None:
    qkv = normal(1, 12, 9, 9).float()
    qkv[:, 4:8] = 3.0
    mean = qkv[:, 8:].mean((2, 3), keepdim=True).expand(1, 4, 9, 9)
    torch.testing.assert_close(fused.attention(qkv, 1, NONE), mean, rtol=1e-5, atol=1e-6)


# The coupling


def split(h: Tensor, components: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    a, b, *mixture = h.unflatten(1, (-1, 2 + 3 * components)).split([1, 1, *[components] * 3], dim=2)
    return a.squeeze(2).tanh(), b.squeeze(2), mixture


def couple(x: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    log_scale, shift, mixture = split(h, components)
    u, log_derivative = mixture_logit(x, *mixture, dim=2)
    return u * log_scale.exp() + shift, log_derivative + log_scale


def coupling(
    components: int, shape: tuple[int, int, int, int], layout: str = "channels last", seed: int = 1
) -> tuple[Tensor, Tensor]:
    """x and h, float64: mixtures from broad to narrow, some log-scales below the floor."""
    batch, channels, height, width = shape
    h = normal(batch, channels, 2 + 3 * components, height, width, seed=seed)
    h[:, :, 2 : 2 + components] *= 3
    h[:, :, 2 + components : 2 + 2 * components] *= 2
    h[:, :, 2 + 2 * components :] = 1.2 * h[:, :, 2 + 2 * components :] - 1
    h[0, 0, -1, 0, 0] = -8
    return laid_out(3 * normal(*shape, seed=seed + 1), layout), laid_out(h.flatten(1, 2), layout)


COUPLED = {
    "contiguous": (2, 3, 3, 5),
    "channels last": (1, 2, 4, 4),
    "every second": (3, 1, 1, 2),
    "turned": (1, 3, 3, 1),
}


@pytest.mark.parametrize("components", [1, 3, 8, 32])
def test_couple_is_the_mixtures_logit_scaled_and_shifted(components: int) -> None:
    for layout, shape in COUPLED.items():
        assert_alike(
            lambda x, h: fused.couple(x, h, components),
            lambda x, h: couple(x, h, components),
            *coupling(components, shape, layout),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_couple_and_uncouple_take_the_half_of_an_image_where_it_lies(layout: str) -> None:
    """As a chunk of the channels or of the columns, which is not contiguous."""
    whole = laid_out(3 * normal(2, 4, 3, 6), layout)
    for half, wide in ((whole[:, 2:], (2, 3, 6)), (whole[:, :, :, 3:], (4, 3, 3))):
        _, h = coupling(3, (2, *wide), layout)
        for found, expected in zip(
            outcomes(lambda x, h: fused.couple(x, h, 3), [half, h]),
            outcomes(lambda x, h: couple(x, h, 3), [half, h]),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, **DOUBLE)
        for found, expected in zip(
            fused.uncouple(half, h, 3),
            fused.uncouple(half.contiguous(), h.contiguous(), 3),
            strict=True,
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("tail", [-1, 1])
def test_float32_keeps_its_precision_in_both_tails_and_gradients_stay_finite(tail: int) -> None:
    x, h = far_out(tail)
    found = outcomes(lambda x, h: fused.couple(x, h, 5), [x, h])
    exact = couple(x.double(), h.double(), 5)
    for value, expected in zip(found[:2], exact, strict=True):
        assert off(value, expected) < 2e-5
    assert all(value.isfinite().all() for value in found)
    assert exact[0][..., -1].abs() > 1e3, "far out the logit grows with x instead of saturating"


def far_out(tail: int) -> tuple[Tensor, Tensor]:
    """x, float32 [1, 1, 1, 1500], from near the middle to 1e5 on one side, and mixtures of 5 components."""
    _, h = coupling(5, (1, 1, 1, 1500))
    return (tail * torch.logspace(-3, 5, 1500))[None, None, None], h.float()


@pytest.mark.parametrize("tail", [-1, 1])
def test_float32_in_the_tails_is_as_near_to_float64_as_plain_pytorch(tail: int) -> None:
    inputs = list(far_out(tail))
    exact = outcomes(lambda x, h: couple(x, h, 5), [tensor.double() for tensor in inputs])
    plain = outcomes(lambda x, h: couple(x, h, 5), inputs)
    for found, unfused, expected in zip(
        outcomes(lambda x, h: fused.couple(x, h, 5), inputs), plain, exact, strict=True
    ):
        assert off(found, expected) <= 8 * off(unfused, expected) + SINGLE


@pytest.mark.parametrize("x", [1e3, -1e3, 1e5, -1e5])
def test_equal_components_are_one_logistic_however_far_out(x: float) -> None:
    """Whose logit is x itself: slope 1 and its logarithm 0; each component has a third of the gradient."""
    given, h = torch.full((1, 1, 1, 1), x), torch.zeros(1, 11, 1, 1, requires_grad=True)
    y, terms = fused.couple(given, h, 3)
    assert abs(terms.item()) < 1e-6
    (gradient,) = torch.autograd.grad(y.sum(), h)
    torch.testing.assert_close(gradient[0, 5:8, 0, 0], torch.full((3,), -1 / 3), rtol=1e-6, atol=0)


def test_below_the_floor_the_log_scales_have_no_gradient_and_are_the_floor() -> None:
    x, h = coupling(3, (1, 2, 3, 4))
    raw = h.unflatten(1, (2, 11))
    raw[:, :, 8] = -8
    y, terms, _, grad_h = outcomes(lambda x, h: fused.couple(x, h, 3), [x, h])
    gradients = grad_h.unflatten(1, (2, 11))
    assert not gradients[:, :, 8].any()
    assert gradients[:, :, 5].any()
    assert gradients[:, :, 9:].any()
    raw[:, :, 8] = -7
    torch.testing.assert_close((y, terms), fused.couple(x, h, 3), rtol=0, atol=0)


@pytest.mark.parametrize("components", [1, 3, 8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_uncouple_undoes_couple(components: int, dtype: torch.dtype) -> None:
    for layout, shape in COUPLED.items():
        x, h = (laid_out(tensor.to(dtype), layout) for tensor in coupling(components, shape, layout))
        y, terms = fused.couple(x, h, components)
        back, minus_terms = fused.uncouple(y, h, components)
        epsilon = torch.finfo(dtype).eps
        # where the density all but vanishes, many x share one y
        room = 64 * epsilon * ((1 + y.abs()) * (-terms).exp() + 1 + x.abs())
        assert ((back - x).abs() <= room).all()
        exact = couple(back.double(), h.double(), components)[1]
        assert off(minus_terms, -exact) < 1e4 * epsilon


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_uncouple_rests_where_solve_does(dtype: torch.dtype, scale: float) -> None:
    """The residual is 4 eps (1 + |u|), or x's own spacing is what is left of it."""
    n, components = 3000, 5
    _, h = coupling(components, (1, 1, 1, n))
    h = h.to(dtype)
    h[:, :2] = 0  # y is u itself
    u = (scale * normal(1, 1, 1, n, seed=5)).to(dtype)
    x, minus_slope = fused.uncouple(u, h, components)
    reached, log_slope = fused.couple(x, h, components)
    epsilon = torch.finfo(dtype).eps
    residual = (reached - u).abs()
    within_tolerance = residual <= 4 * epsilon * (1 + u.abs())
    within_spacing = residual <= 2 * epsilon * x.abs() * log_slope.exp() + 8 * epsilon * (1 + u.abs())
    assert (within_tolerance | within_spacing).all()
    torch.testing.assert_close(minus_slope, -log_slope, rtol=0, atol=0)
    expected = solve(u, *split(h, components)[2], dim=2).x
    room = 16 * epsilon * ((1 + u.abs()) * (-log_slope).exp() + 1 + x.abs())
    assert ((x - expected).abs() <= room).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_elements_result_depends_on_no_other_element(dtype: torch.dtype) -> None:
    """Bit for bit, whatever else is in the batch, in the channel or in the register, and wherever it lies."""
    x, h = (tensor.to(dtype) for tensor in coupling(3, (3, 2, 5, 7)))
    whole = (
        *fused.couple(x, h, 3),
        *fused.uncouple(x, h, 3),
        *outcomes(lambda x, h: fused.couple(x, h, 3), [x, h]),
    )
    for b, c, i, j in ((0, 0, 0, 0), (1, 1, 2, 3), (2, 1, 4, 6)):
        one_x = x[b, c, i, j].reshape(1, 1, 1, 1).clone()
        one_h = h[b].unflatten(0, (2, 11))[c, :, i, j].reshape(1, 11, 1, 1).clone()
        found = *fused.couple(one_x, one_h, 3), *fused.uncouple(one_x, one_h, 3)
        for value, expected in zip(found, whole[:4], strict=True):
            assert torch.equal(value[0, 0, 0, 0], expected[b, c, i, j])
        others_x, others_h = (1e3 * normal(*tensor.shape, seed=7).to(dtype) for tensor in (x, h))
        others_x[b, c, i, j] = x[b, c, i, j]
        others_h.unflatten(1, (2, 11))[b, c, :, i, j] = h.unflatten(1, (2, 11))[b, c, :, i, j]
        again = outcomes(lambda x, h: fused.couple(x, h, 3), [others_x, others_h])
        found = *again[:2], *fused.uncouple(others_x, others_h, 3), *again
        for value, expected in zip(found[:7], whole[:7], strict=True):
            assert torch.equal(value[b, c, i, j], expected[b, c, i, j])


NANS = {"x": None, "a": 0, "b": 1, "logits": 3, "means": 5, "log-scales": 9}
"""The channel of h, of 3 components, that is not a number."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", NANS)
def test_couple_gives_nan_for_nan_and_for_that_element_alone(where: str, dtype: torch.dtype) -> None:
    x, h = (tensor.to(dtype) for tensor in coupling(3, (1, 1, 1, 20)))
    clean = fused.couple(x, h, 3)
    put_nan(x, h, where)
    expected = torch.stack(couple(x, h, 3)).isnan()
    assert expected.any()
    found = fused.couple(x, h, 3)
    assert torch.equal(torch.stack(found).isnan(), expected)
    for value, before in zip(found, clean, strict=True):
        assert torch.equal(value[..., :5], before[..., :5])
        assert torch.equal(value[..., 6:], before[..., 6:])
    *_, grad_x, grad_h = outcomes(lambda x, h: fused.couple(x, h, 3), [x, h])
    assert where == "b" or grad_x[..., 5].isnan()
    assert where == "b" or grad_h[..., 5].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", NANS)
def test_uncouple_gives_nan_for_nan_and_ends(where: str, dtype: torch.dtype) -> None:
    x, h = (tensor.to(dtype) for tensor in coupling(3, (1, 1, 1, 20)))
    put_nan(x, h, where)
    back, terms = fused.uncouple(x, h, 3)
    assert back.isnan().flatten().nonzero().tolist() == [[5]]
    assert terms.isnan().flatten().nonzero().tolist() == [[5]]


def put_nan(x: Tensor, h: Tensor, where: str) -> None:
    channel = NANS[where]
    place = x[0, 0, 0] if channel is None else h[0, channel, 0]
    place[5] = float("nan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("where", NANS)
def test_couple_handles_infinity_as_the_reference_does(where: str, sign: int, dtype: torch.dtype) -> None:
    x, h = (tensor.to(dtype) for tensor in coupling(3, (1, 1, 1, 40), seed=3))
    channel = NANS[where]
    (x[0, 0, 0] if channel is None else h[0, channel, 0])[::2] = sign * float("inf")
    found, expected = torch.stack(fused.couple(x, h, 3)), torch.stack(couple(x, h, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_convolution_gate_and_attention_give_nan_for_nan_where_plain_pytorch_does() -> None:
    x, gates, qkv = (normal(1, channels, 3, 7).float() for channels in (24, 48, 24))
    for tensor in (x, gates, qkv):
        tensor[0, 3, 1, 2] = float("nan")
    weight, bias, gain = normal(7, 48, 1, 1).float(), torch.zeros(7), torch.ones(24)
    found = fused.elu_convolution(x, weight, bias, NONE)
    assert torch.equal(found.isnan(), conv2d(concat_elu(x), weight, bias).isnan())
    found = fused.gate_norm(torch.zeros_like(x), gates, gain, torch.zeros(24))
    assert found.isnan().all(1).flatten().nonzero().tolist() == [[9]]
    assert found.isnan().sum() == 24
    assert torch.equal(fused.attention(qkv, 2, NONE).isnan(), softmax_attention(qkv, 2).isnan())
    keys = normal(1, 24, 3, 7).float()
    keys[0, 8, 1, 2] = float("nan")  # of the first head's keys: every query reads it
    assert torch.equal(fused.attention(keys, 2, NONE).isnan(), softmax_attention(keys, 2).isnan())


def test_a_batch_of_nothing_gives_nothing() -> None:
    x, h = torch.zeros(0, 2, 3, 4), torch.zeros(0, 22, 3, 4)
    assert fused.couple(x, h, 3)[0].shape == x.shape
    assert fused.uncouple(x, h, 3)[0].shape == x.shape
    assert fused.gate_norm(x, torch.zeros(0, 4, 3, 4), None, None).shape == x.shape
    assert fused.attention(torch.zeros(0, 12, 3, 4), 1, NONE).shape == (0, 4, 3, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads_give_what_one_gives(dtype: torch.dtype) -> None:
    """Values and gradients of inputs bit for bit; gain and bias sum over the threads, and round otherwise."""
    x, gates, qkv = (normal(4, channels, 16, 16).to(dtype) for channels in (24, 48, 72))
    half, h = (tensor.to(dtype) for tensor in coupling(8, (4, 3, 16, 16)))
    gain, bias = normal(24).to(dtype), normal(24, seed=1).to(dtype)
    weight, shift = torch.eye(48, dtype=dtype)[:, :, None, None], torch.zeros(48, dtype=dtype)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(
                [
                    outcomes(lambda x: fused.elu_convolution(x, weight, shift, (0.3, 5)), [x]),
                    outcomes(lambda qkv: fused.attention(qkv, 3, (0.3, 5)), [qkv]),
                    outcomes(lambda x, h: fused.couple(x, h, 8), [half, h]),
                    list(fused.uncouple(half, h, 8)),
                    outcomes(fused.gate_norm, [x, gates, gain, bias]),
                ]
            )
        finally:
            torch.set_num_threads(1)
    for one, two in zip(*found, strict=True):
        for value, expected in zip(two[:3], one[:3], strict=True):
            assert torch.equal(value, expected)
        for value, expected in zip(two[3:], one[3:], strict=True):
            assert off(value, expected.double()) < 1000 * torch.finfo(dtype).eps


# Whole models

MODELS = {
    **ABLATIONS,
    "one component": {"components": 1},
    "heads without a kernel": {"filters": 10},
    "weight normalization": {"weight_norm": True},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> FlowPP:
    torch.manual_seed(0)
    model = trained_looking(ModelConfig(**{**SMALL, **MODELS[request.param]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * normal(*parameter.shape))
    return model


def both(model: FlowPP) -> Iterator[FlowPP]:
    for fuses in (True, False):
        model.fuse(fuses)
        yield model


def test_a_fused_models_log_weight_and_gradients_are_the_plain_ones(model: FlowPP) -> None:
    images, noise = random_images(model.config, 3), model.draw_noise(3)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights, gradients = [], []
    for each in both(model.train()):
        weights.append(each.log_weight(images, noise))
        gradients.append(torch.autograd.grad(weights[-1].sum(), parameters))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-11, atol=1e-9)
    for fused_gradient, gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(fused_gradient, gradient, rtol=1e-8, atol=1e-8)


def test_a_fused_model_decodes_and_maps_bits_as_the_plain_one(model: FlowPP) -> None:
    images, noise = random_images(model.config, 3), model.draw_noise(3)
    latents = normal(4, *model.config.latent_shape)
    found = [
        (each.decode(latents), each.bits_map(images, noise), *each.flow.inverse(0.8 * latents)) for each in both(model)
    ]
    assert torch.equal(found[0][0], found[1][0])
    for value, expected in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)


def test_in_float32_a_fused_model_is_as_near_to_float64_as_a_plain_one(model: FlowPP) -> None:
    images, noise = random_images(model.config, 8), model.draw_noise(8)
    with torch.no_grad():
        exact = model.log_weight(images, noise)
        found = [each.log_weight(images, noise.float()) for each in both(model.float())]
    errors = [off(weights, exact) for weights in found]
    assert errors[0] <= 4 * errors[1] + 1e-5


def test_attention_that_looks_at_one_place_takes_no_longer_than_any_other() -> None:
    """Its weights elsewhere would be denormal numbers, or make such gradients: a hundred times slower."""
    grad = 1e-9 * normal(1, 32, 16, 16).float()
    seconds = {}
    for sharpness in (0.1, 10.0):
        qkv = (sharpness * normal(1, 96, 16, 16)).float().requires_grad_()
        out = fused.attention(qkv, 2, NONE)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.autograd.grad(out, qkv, grad, retain_graph=True)
            times.append(time.perf_counter() - start)
        seconds[sharpness] = min(times)
    assert seconds[10.0] < 2 * seconds[0.1]


def test_the_switch_turns_every_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    call = cpu_kernels._call
    monkeypatch.setattr(cpu_kernels, "_call", lambda name, *arguments: (called.append(name), call(name, *arguments)))
    torch.manual_seed(0)
    model = FlowPP(ModelConfig(**SMALL))
    images = random_images(model.config, 4)
    model.initialize(images)
    called.clear()
    used = []
    for each in both(model):
        each.log_prob(images).sum().backward()
        each.decode(torch.zeros(1, *model.config.latent_shape))
        used.append(set(called))
        called.clear()
    passes = {f"{name}_{way}" for name in ("concat_elu", "gate_norm", "attention") for way in ("forward", "backward")}
    passes |= {"couple", "couple_backward", "uncouple"}
    if cpu_kernels.has_tiles(torch.float32):
        passes |= {"convolve_tiles", "convolve_tiles_weights"}
    assert used == [passes, set()]


def test_other_dtypes_and_autocast_pass_by_plain_pytorch_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    attention = fused.Fusing()
    with caplog.at_level(logging.WARNING):
        assert attention.fuses(torch.zeros(1))
        assert not attention.fuses(torch.zeros(1, dtype=torch.bfloat16))
        with torch.autocast("cpu", torch.bfloat16):
            assert not attention.fuses(torch.zeros(1))
    assert not caplog.records


def test_the_reference_attention_of_these_tests_is_pytorchs() -> None:
    q, k, v = normal(3, 1, 2, 15, 4)
    rows = torch.cat([part.transpose(1, 2).flatten(2) for part in (q, k, v)], 2)  # [1, 15, 24]
    expected = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    found = softmax_attention(rows.unflatten(1, (3, 5)).permute(0, 3, 1, 2), 2)
    torch.testing.assert_close(found.permute(0, 2, 3, 1).flatten(1, 2), expected, **DOUBLE)
