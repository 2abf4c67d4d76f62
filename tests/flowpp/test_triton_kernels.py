"""The Triton kernels against `MixtureCoupling`: value, gradient, inverse, and float32 in the tails.

Without a CUDA device Triton's interpreter runs them, on the CPU.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowpp import triton_kernels
from flowpp.coupling import MixtureCoupling
from flowpp.logistic import LOG_SCALE_FLOOR
from flowpp.triton_kernels import couple, couple_backward, uncouple

if not torch.cuda.is_available():
    # Triton asks when it is imported, which torch does in the midst of other tests: before any test runs
    os.environ["TRITON_INTERPRET"] = "1"


def devices() -> list[Any]:
    compiled, absent = torch.cuda.is_available(), importlib.util.find_spec("triton") is None
    interpreted = pytest.mark.skipif(
        compiled or absent, reason="compiled for CUDA instead, or no Triton for this system"
    )
    return [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


pytestmark = pytest.mark.parametrize("device", devices())
LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
SHAPE = (2, 2, 3, 5)  # B, C, H, W: 30 rows a channel, which fill blocks of 64 and of 8 (K = 4, 32) in part


class Given(nn.Module):
    """A conditioner whose output is given."""

    def __init__(self, h: Tensor) -> None:
        super().__init__()
        self.h = h

    def forward(self, x1: Tensor, context: Tensor | None) -> Tensor:
        return self.h


def draw(
    device: str,
    components: int,
    shape: tuple[int, ...] = SHAPE,
    layout: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(x [B, 2C, H, W], h) of mixtures from broad to nearly degenerate."""
    generator = torch.Generator().manual_seed(seed)
    b, c, *rest = shape
    x = 4 * torch.randn(b, 2 * c, *rest, dtype=torch.float64, generator=generator)
    h = torch.randn(b, c, 2 + 3 * components, *rest, dtype=torch.float64, generator=generator)
    _, _, logits, means, log_scales = parts(h, components)
    logits *= 3
    means *= 4
    log_scales *= 2
    log_scales -= 1
    return x.to(device, dtype), h.flatten(1, 2).to(device, dtype).contiguous(memory_format=layout)


def parts(h: Tensor, components: int) -> tuple[Tensor, ...]:
    """Views of a, b, logits, means and log-scales in h [B, C, 2 + 3K, H, W] or [B, C (2 + 3K), H, W]."""
    per_channel = h if h.dim() == 5 else h.unflatten(1, (-1, 2 + 3 * components))
    return per_channel.split([1, 1, components, components, components], dim=2)


def second(x: Tensor) -> Tensor:
    return x.chunk(2, dim=1)[1]


def reference(x: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    y, terms = MixtureCoupling(Given(h), components).couple(x)
    return second(y), terms


def reference_gradient(weights: tuple[Tensor, Tensor], x: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    x, h = x.detach().clone().requires_grad_(), h.detach().clone().requires_grad_()
    value = sum((w * part).sum() for w, part in zip(weights, reference(x, h, components), strict=True))
    grad_x, grad_h = torch.autograd.grad(value, (x, h))
    return second(grad_x), grad_h


def logit_of_cdf(x2: Tensor, h: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """(logit F(x2), its log derivative) by the kernel: with a = b = 0."""
    h = h.clone()
    for part in parts(h, components)[:2]:
        part.zero_()
    return couple(x2, h, components)


@pytest.mark.parametrize("components", [1, 4, 5, 32, 128])
@LAYOUTS
def test_the_value_is_the_couplings(device: str, components: int, layout: torch.memory_format) -> None:
    x, h = draw(device, components, layout=layout)
    y, terms = couple(second(x), h, components)
    expected_y, expected_terms = reference(x, h, components)
    torch.testing.assert_close(y, expected_y, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("components", [1, 4, 5, 32])
@LAYOUTS
def test_the_gradient_is_the_couplings_and_lies_in_memory_as_h_does(
    device: str, components: int, layout: torch.memory_format
) -> None:
    x, h = draw(device, components, layout=layout)
    grad_y, grad_terms = draw(device, 1, seed=1)[0].chunk(2, dim=1)
    grad_x, grad_h = couple_backward(grad_y, grad_terms, second(x), h, components)
    expected_x, expected_h = reference_gradient((grad_y, grad_terms), x, h, components)
    torch.testing.assert_close(grad_x, expected_x, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad_h, expected_h, rtol=1e-9, atol=1e-11)
    assert grad_h.stride() == h.stride()


@pytest.mark.parametrize(
    ("components", "layout"),
    [(1, torch.channels_last), (4, torch.contiguous_format), (5, torch.channels_last), (32, torch.channels_last)],
)
def test_the_inverse_undoes_the_coupling(device: str, components: int, layout: torch.memory_format) -> None:
    shape = (2, 2, 3, 5) if components < 32 else (3, 1, 1, 5)  # interpreted, it takes long
    x, h = draw(device, components, shape, layout)
    y, terms = couple(second(x), h, components)
    x2, inverse_terms = uncouple(y, h, components)
    # where the density all but vanishes, many x share one y
    slack = 1e-11 + 1e-13 * (1 + y.abs()) * (-terms).exp()
    assert ((x2 - second(x)).abs() <= slack).all()
    assert ((inverse_terms + terms).abs() <= 1e-9 + 1e7 * slack).all()
    sharp = slack < 1e-10
    assert sharp.float().mean() > 0.8
    torch.testing.assert_close(inverse_terms[sharp], -terms[sharp], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("tail", [-1, 1])
def test_float32_keeps_its_precision_in_both_tails(device: str, tail: int) -> None:
    shape = (1, 1, 10, 40)
    _, h = draw(device, 5, shape, dtype=torch.float32)
    x2 = tail * torch.logspace(-3, 5, 400, device=device).view(shape)
    single = torch.stack(logit_of_cdf(x2, h, 5)).double()
    exact = torch.stack(logit_of_cdf(x2.double(), h.double(), 5))
    # as in test_logistic: z = (x - mean) / scale itself is rounded
    assert ((single - exact).abs() / (1 + exact.abs())).max() < 2e-5
    assert single[0].flatten()[-1] * tail > 100, "far out the logit grows with x instead of saturating"


@pytest.mark.parametrize("tail", [-1, 1])
def test_float32_keeps_the_gradients_precision_in_both_tails(device: str, tail: int) -> None:
    shape = (1, 1, 10, 40)
    _, h = draw(device, 5, shape, dtype=torch.float32)
    x2 = tail * torch.logspace(-3, 5, 400, device=device).view(shape)
    ones = torch.ones_like(x2)
    single = couple_backward(ones, ones, x2, h, 5)
    exact = couple_backward(ones.double(), ones.double(), x2.double(), h.double(), 5)
    # a gradient's terms are products with z, whose own rounding grows with |z|
    scales = parts(h.double(), 5)[4].clamp(min=LOG_SCALE_FLOOR).exp().amin(2)
    size = (1 + x2.double().abs()) / scales
    for gradient, expected in zip(single, exact, strict=True):
        assert gradient.isfinite().all()
        assert ((gradient - expected).abs() / (1 + expected.abs() + size)).max() < 2e-5


def test_log_scales_below_the_floor_count_as_the_floor_and_have_no_gradient(device: str) -> None:
    x, h = draw(device, 4)
    floored = h.clone()
    parts(h, 4)[4][:, :, ::2] = LOG_SCALE_FLOOR - 1
    parts(floored, 4)[4][:, :, ::2] = LOG_SCALE_FLOOR
    x2, ones = second(x), torch.ones_like(second(x))
    torch.testing.assert_close(couple(x2, h, 4), couple(x2, floored, 4), rtol=0, atol=0)
    torch.testing.assert_close(uncouple(x2, h, 4), uncouple(x2, floored, 4), rtol=0, atol=0)
    *_, means, log_scales = parts(couple_backward(ones, ones, x2, h, 4)[1], 4)
    assert not log_scales[:, :, ::2].any()
    assert log_scales[:, :, 1::2].any()
    assert means[:, :, ::2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1, 30])
def test_at_rest_the_residual_is_4_eps_or_x_cannot_move(device: str, dtype: torch.dtype, scale: float) -> None:
    shape = (2, 1, 3, 11)
    y, h = draw(device, 5, shape, dtype=dtype)
    for part in parts(h, 5)[:2]:
        part.zero_()
    u = scale * second(y) / 4
    x2, inverse_terms = uncouple(u, h, 5)
    reached, terms = logit_of_cdf(x2, h, 5)
    epsilon = torch.finfo(dtype).eps
    residual = (reached - u).abs()
    within_tolerance = residual <= 4 * epsilon * (1 + u.abs())
    within_spacing = residual <= 2 * epsilon * x2.abs() * terms.exp() + 8 * epsilon * (1 + u.abs())
    assert (within_tolerance | within_spacing).all()
    torch.testing.assert_close(inverse_terms, -terms, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, which interprets
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_bisection_takes_over_where_newton_does_not_settle(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steep steps in a flat landscape, where Newton's method jumps from side to side; within `solve`'s bound."""
    bound = 26 + 2 * math.ceil(math.log2(100.1 * math.exp(7) / (4 * torch.finfo(torch.float64).eps)))
    monkeypatch.setattr(triton_kernels, "evaluation_limits", lambda dtype: (24, bound))
    h = torch.zeros(1, 2 + 3 * 5, 1, 30, dtype=torch.float64, device=device)
    *_, means, log_scales = parts(h, 5)
    means.copy_(torch.linspace(-50, 50, 5)[:, None, None])
    log_scales.fill_(LOG_SCALE_FLOOR)
    u = torch.linspace(-4, 4, 30, dtype=torch.float64, device=device).view(1, 1, 1, 30)
    x2, _ = uncouple(u, h, 5)
    reached, terms = couple(x2, h, 5)
    epsilon = torch.finfo(torch.float64).eps
    assert ((reached - u).abs() <= 4 * epsilon * (1 + u.abs() + x2.abs() * terms.exp())).all()


def test_a_position_does_not_depend_on_those_it_shares_a_block_with(device: str) -> None:
    y, h = draw(device, 5, (1, 1, 1, 21))
    parts(h, 5)[4].clamp_(min=0)  # where the density all but vanishes, a rounding moves x far
    together = uncouple(second(y), h, 5)
    for index in range(0, 21, 10):
        alone = uncouple(second(y)[..., index : index + 1], h[..., index : index + 1], 5)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_of_them[..., index : index + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, which interprets
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_nan_comes_through_and_infinity_ends_the_search(device: str) -> None:
    x, h = draw(device, 4, (1, 1, 1, 8))
    for n, part in enumerate(parts(h, 4)):
        part[0, 0, 0, 0, n] = float("nan")
    x2 = second(x).contiguous()
    x2[..., 5], x2[..., 6] = float("nan"), float("inf")
    ones = torch.ones_like(x2)
    y, terms = couple(x2, h, 4)
    found, inverse_terms = uncouple(x2, h, 4)
    grad_x, _ = couple_backward(ones, ones, x2, h, 4)
    assert y[..., :6].isnan().all()
    assert terms[..., [0, 2, 3, 4, 5]].isnan().all()
    assert found[..., :6].isnan().all()
    assert inverse_terms[..., [0, 2, 3, 4, 5]].isnan().all()
    assert grad_x[..., [0, 2, 3, 4, 5]].isnan().all()
    for result in (y, terms, found, inverse_terms, grad_x):
        assert result[..., 7].isfinite().all()


def test_any_strides_will_do(device: str) -> None:
    """Gradients of a sum are expanded; so may parameters be; H and W may lie in memory the other way round."""
    x, h = draw(device, 4)
    parts(h, 4)[4].clamp_(min=0)  # where the density all but vanishes, a rounding moves x far
    x2 = second(x).transpose(2, 3).contiguous().transpose(2, 3)
    grad_terms = torch.tensor(0.5, dtype=x.dtype, device=device).expand_as(x2)
    expanded = h[:1, :, :, :1].expand_as(h)
    turned = h.transpose(2, 3).contiguous().transpose(2, 3)
    for other in (expanded, turned):
        plain = x2.contiguous(), other.contiguous(), 4
        results = (*couple(x2, other, 4), *couple_backward(x2, grad_terms, x2, other, 4))
        expected = (*couple(*plain), *couple_backward(plain[0], grad_terms.contiguous(), *plain))
        torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(uncouple(x2, turned, 4), uncouple(second(x), h, 4), rtol=1e-9, atol=1e-9)


def test_of_no_images_nothing_is_made(device: str) -> None:
    x, h = draw(device, 4, (0, 2, 3, 5))
    assert [part.shape for part in couple(second(x), h, 4)] == [(0, 2, 3, 5)] * 2


def test_what_a_kernel_would_misread_is_refused(device: str) -> None:
    x, h = draw(device, 4)
    x2 = second(x)
    with pytest.raises(ValueError, match=re.escape("expected (2, 34, 3, 5)")):
        couple(x2, h, 5)
    with pytest.raises(ValueError, match=r"float64.*not.*float32"):
        couple(x2, h.float(), 4)
    with pytest.raises(ValueError, match=re.escape("expected (2, 2, 3, 5)")):
        couple_backward(x2, x2[:1], x2, h, 4)
    with pytest.raises(ValueError, match=r"float32 and float64, not torch\.bfloat16"):
        uncouple(x2.bfloat16(), h.bfloat16(), 4)
    with pytest.raises(ValueError, match="1 to 128 mixture components, not 0"):
        couple(x2, h, 0)


def run_python(source: str, **environment: str) -> str:
    """What a fresh Python prints, in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_without_triton_the_module_imports_and_a_call_says_what_is_missing(device: str) -> None:
    said = run_python("""
        import sys
        import torch
        from flowpp.triton_kernels import couple
        print("triton" in sys.modules)
        sys.modules["triton"] = None
        try:
            couple(torch.zeros(1, 1, 1, 1), torch.zeros(1, 5, 1, 1), 1)
        except ModuleNotFoundError as error:
            print(error)
        """)
    assert said.startswith("False\n"), "importing the launches imports no triton"
    assert "need triton, which is not installed" in said
    assert "requirements-torch.txt" in said


def test_what_the_interpreter_runs_the_compiler_takes(device: str, tmp_path: Any) -> None:
    """For sm_80, without a device. The interpreter is Python, and lets much pass that the compiler does not."""
    said = run_python(
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from flowpp import triton_mixture

        constants = dict(K=5, R=16, COLUMNS=8, EPSILON=2.0**-23, MOST_EVALUATIONS=600)
        for name in ("couple", "couple_backward", "uncouple"):
            kernel = getattr(triton_mixture, name)
            kinds = {"B": "i32", "C": "i32", "P": "i32"} | dict.fromkeys(constants, "constexpr")
            signature = {a: kinds.get(a, ("i32",) * 3 if "strides" in a else "*fp32") for a in kernel.arg_names}
            fixed = {a: value for a, value in constants.items() if a in kernel.arg_names}
            compiled = triton.compile(triton.compiler.ASTSource(kernel, signature, fixed), GPUTarget("cuda", 80, 32))
            print(name, len(compiled.asm["cubin"]) > 0)
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert said == "couple True\ncouple_backward True\nuncouple True\n"
