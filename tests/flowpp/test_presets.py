"""The presets: the paper's models to the parameter, at their real sizes, with the paper's recipes."""

import math

import pytest
import torch
from torch import nn

from flowpp.learner import learning_rate
from flowpp.model import FlowPP
from flowpp.presets import PRESETS, resolve_training

# whole, dequantizer, its context network, main flow (FLOWPP.md; the affine dequantizer's from the authors' layers)
CIFAR10 = (31_443_440, 3_466_976, 167_936, 27_976_464)
SIZE64 = (73_489_960, 5_654_440, 279_040, 67_835_520)
PARAMETERS = {
    "cifar10": CIFAR10,
    "imagenet32": (168_955_724, 35_549_536, 506_624, 133_406_188),
    "imagenet64": SIZE64,
    "imagenet64-5bit": SIZE64,
    "celeba64-5bit": SIZE64,
    "celeba64-3bit": SIZE64,
    "cifar10-uniform-dequantization": (32_324_408, 0, 0, 32_324_408),
    "cifar10-affine": (32_045_708, 3_035_168, 167_936, 29_010_540),
    "cifar10-no-attention": CIFAR10,
}


# of presets that differ in their recipes alone, one
MODELS = {PRESETS[name].model.model_dump_json(): name for name in PARAMETERS}.values()


def count(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


@pytest.mark.parametrize("preset", PARAMETERS)
def test_a_model_has_the_papers_parameters_whole_and_by_part(preset: str) -> None:
    with torch.device("meta"):
        model = FlowPP(preset)
    context = getattr(model.dequantizer, "context", None)
    parts = (count(model), count(model.dequantizer), count(context), count(model.flow))
    assert parts == PARAMETERS[preset]


@pytest.mark.parametrize("preset", MODELS)
def test_a_model_goes_forward_and_back_at_its_real_size(preset: str) -> None:
    torch.manual_seed(0)
    model = FlowPP(preset).eval()
    config = model.config
    images = torch.randint(0, config.levels, (4, *config.image_shape), dtype=torch.uint8)
    model.initialize(images)
    with torch.no_grad():
        noise = model.draw_noise(1)
        u, _ = model.dequantizer(images[:1].float(), noise)
        v = images[:1] + u
        z, log_det = model.flow(v)
        recovered, inverse_log_det = model.flow.inverse(z)
    assert z.shape == (1, *config.latent_shape)
    assert ((u >= 0) & (u <= 1)).all()  # float32's sigmoid rounds to 1 beyond 17
    assert (recovered - v).abs().max() < 1e-4 * config.levels
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-5, atol=0)
    assert math.isfinite(model.bits_per_dim(images[:1]).item())


def test_the_presets_are_the_papers_and_the_cpu_sizes() -> None:
    assert PRESETS.keys() == {*PARAMETERS, "small", "tiny"}


def rates(preset: str, *steps: int) -> list[float]:
    return [learning_rate(PRESETS[preset].training, step) for step in steps]


RECIPES = {  # batch, init batch, EMA, dropout
    "cifar10": (64, 128, 0.999, 0.2),
    "imagenet32": (32, 32, 0.999222, 0),
    "imagenet64": (72, 72, 0.999, 0),
    "imagenet64-5bit": (60, 60, 0.999, 0),
    "celeba64-5bit": (56, 56, 0.999, 0),
    "celeba64-3bit": (56, 56, 0.999, 0),
}


@pytest.mark.parametrize("preset", RECIPES)
def test_a_recipe_has_the_papers_batch_ema_and_dropout(preset: str) -> None:
    model, training = PRESETS[preset].model, PRESETS[preset].training
    assert (training.batch_size, training.init_batch_size, training.ema_decay, model.dropout) == RECIPES[preset]
    assert training.gradient_clip == 1


def test_cifar10_warms_up_over_2000_steps_and_stays() -> None:
    assert rates("cifar10", 1000, 2000, 300_000) == pytest.approx([1.5e-4, 3e-4, 3e-4])


def test_imagenet32_decays_by_a_factor_of_099995_a_step_from_step_50000_to_3e_4() -> None:
    assert rates("imagenet32", 2500, 5000, 50_000) == pytest.approx([5e-4, 1e-3, 1e-3])
    at, after, last, floor = rates("imagenet32", 60_000, 60_001, 74_079, 600_000)
    assert after / at == pytest.approx(0.99995, rel=1e-7)
    assert (last, floor) == pytest.approx((3e-4, 3e-4))


def test_imagenet64_decays_to_3e_4_by_step_55000_and_is_1e_5_late() -> None:
    assert rates("imagenet64", 10_000, 50_000, 55_000, 229_999) == pytest.approx([4e-4, 4e-4, 3e-4, 3e-4])
    assert rates("imagenet64", 230_000, 235_000, 240_000, 299_999) == pytest.approx([0, 5e-6, 1e-5, 1e-5])
    assert rates("imagenet64-5bit", 50_000, 55_000, 150_000) == pytest.approx([4e-4, 3e-4, 1e-5])


def test_celeba64_decays_from_4e_5_to_1e_5() -> None:
    assert rates("celeba64-3bit", 10_000, 20_000, 50_000, 55_000) == pytest.approx([2e-5, 4e-5, 4e-5, 1e-5])


def test_a_shorter_run_keeps_the_shape_of_the_schedule() -> None:
    short = resolve_training("imagenet32", {"steps": 64_057})
    assert [point.step for point in short.milestones] == [4_999, 7_407]
    assert learning_rate(short, 64_057) == pytest.approx(3e-4)
