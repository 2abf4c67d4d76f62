"""The baseline has FlowPP's values and gradients: what is compared in speed is one function."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks import baseline
from flowpp import FlowPP
from flowpp.config import DequantizerConfig, ModelConfig

CONFIG = ModelConfig(
    height=8,
    width=8,
    filters=8,
    blocks=2,
    components=3,
    heads=2,
    dropout=0.2,
    flow=("columns x3", "squeeze", "channels x2", "columns x2"),
    dequantizer=DequantizerConfig(flow=("columns x2",), blocks=1, context_filters=6, context_blocks=2),
)


def smooth_images(n: int) -> Tensor:
    """uint8 [n, 3, 8, 8]: of noise the baseline loses the upper tail."""
    low = torch.rand(n, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return (255 * torch.nn.functional.interpolate(low, size=8, mode="bilinear")).to(torch.uint8)


@pytest.fixture(scope="module")
def model() -> FlowPP:
    """In float64, initialized, each parameter then moved: what starts at zero or one would hide an error."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FlowPP(CONFIG).double().eval()
        model.initialize(smooth_images(16))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def noise(model: FlowPP) -> Tensor:
    return model.draw_noise(4, torch.Generator().manual_seed(1))


def test_the_log_likelihood_is_ours(model: FlowPP, noise: Tensor) -> None:
    images = smooth_images(4)
    with torch.no_grad():
        theirs = baseline.log_prob(model, images, noise)
        ours = model.log_prob(images, noise=noise)
    assert ours.isfinite().all()
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)


def test_every_parameters_gradient_is_ours(model: FlowPP, noise: Tensor) -> None:
    images, parameters = smooth_images(4), dict(model.named_parameters())
    theirs = torch.autograd.grad(baseline.log_prob(model, images, noise).mean(), list(parameters.values()))
    ours = torch.autograd.grad(model.log_prob(images, noise=noise).mean(), list(parameters.values()))
    for name, one, other in zip(parameters, theirs, ours, strict=True):
        assert other.any(), name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_it_decodes_what_ours_encodes_and_as_ours_does(model: FlowPP, noise: Tensor) -> None:
    with torch.no_grad():
        v = model.dequantize(smooth_images(4), noise)
        z, _ = model.flow(v)
    torch.testing.assert_close(model.decode(z, continuous=True), v, rtol=1e-9, atol=1e-9)
    # it stops at an error of TOLERANCE in log F, which the inverse of the flow makes larger
    torch.testing.assert_close(baseline.decode(model, z), v, rtol=0, atol=1e-4)


def test_with_a_finer_tolerance_it_decodes_to_the_same_digits(
    model: FlowPP, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "TOLERANCE", 1e-15)
    monkeypatch.setattr(baseline, "MOST_BISECTIONS", 200)
    latents = torch.randn(4, *CONFIG.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model.decode(latents, continuous=True)
    torch.testing.assert_close(baseline.decode(model, latents), ours, rtol=1e-9, atol=1e-9)


def test_bisection_ends_at_its_tolerance_in_float64_and_at_its_last_step_in_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, means, log_scales = torch.randn(3, 2, 5, 3, 4, 4, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    log_y = baseline._log_cdf(x, logits, means, log_scales)
    steps = []
    found = {
        dtype: counted(steps, log_y.to(dtype), *(part.to(dtype) for part in (logits, means, log_scales)))
        for dtype in (torch.float64, torch.float32)
    }
    reached = baseline._log_cdf(found[torch.float64], logits, means, log_scales)
    # the step that ends it still moves x, by half of a bracket that is as narrow as the tolerance asks
    assert (reached - log_y).abs().max() < 10 * baseline.TOLERANCE
    torch.testing.assert_close(found[torch.float32].double(), x, rtol=0, atol=1e-4)
    assert steps[0] < baseline.MOST_BISECTIONS == steps[1]


def counted(steps: list[int], log_y: Tensor, *mixture: Tensor) -> Tensor:
    """`bisect`, with the number of its evaluations appended to steps."""
    evaluate, count = baseline._log_cdf, 0

    def counting(*arguments: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "_log_cdf", counting)
        found = baseline.bisect(log_y, *mixture)
    steps.append(count)
    return found


def test_dropout_is_on_in_training_and_off_in_evaluation(model: FlowPP, noise: Tensor) -> None:
    images = smooth_images(4)
    with torch.no_grad(), torch.random.fork_rng():
        evaluated = [baseline.log_prob(model, images, noise) for _ in range(2)]
        model.train()
        trained = [baseline.log_prob(model, images, noise) for _ in range(2)]
        model.eval()
    assert torch.equal(*evaluated)
    assert not torch.equal(*trained)


def test_the_tail_it_loses_is_why_images_are_smooth() -> None:
    """Far above a mixture F rounds to 1 in float32: infinity where ours is exact."""
    one = torch.ones(1, 1, 1, 1, 1)
    y = torch.exp(baseline._log_cdf(30 * torch.ones(1, 1, 1, 1), 0 * one, 0 * one, 0 * one))
    assert math.isinf(-torch.log(1 / y - 1).item())
