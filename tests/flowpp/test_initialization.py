"""Data-dependent initialization: one pass gives every part the mean and deviation that were asked for."""

import pytest
import torch
from torch import Tensor, nn

from flowpp.conditioner import Convolution
from flowpp.config import ModelConfig
from flowpp.initialization import initializing
from flowpp.model import FlowPP
from flowpp.presets import PRESETS
from flowpp.transforms import Normalization

CONFIG = ModelConfig(**{**PRESETS["tiny"].model.model_dump(), "height": 8, "width": 8, "dropout": 0.3})


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)


def outputs_of(model: FlowPP, kind: type[nn.Module], images: Tensor, noise: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """What every part of `kind` puts out in one pass."""
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda part, _, out: seen.append((part, out[0] if isinstance(out, tuple) else out)))
        for part in model.modules()
        if isinstance(part, kind)
    ]
    with torch.no_grad():
        model.log_weight(images, noise)
    for hook in hooks:
        hook.remove()
    return seen


def initialized(images: Tensor) -> tuple[FlowPP, Tensor]:
    model = FlowPP(CONFIG).double().train()
    noise = model.draw_noise(len(images))
    with initializing(model):
        model.log_weight(images, noise)
    return model.eval(), noise


def test_every_convolution_puts_out_mean_0_and_its_init_scale(images: Tensor) -> None:
    model, noise = initialized(images)
    convolutions = outputs_of(model, Convolution, images, noise)
    assert {part.init_scale for part, _ in convolutions} == {0.1, 1.0}
    for part, out in convolutions:
        assert out.mean((0, 2, 3)).abs().max() < 1e-10
        # a channel whose input hardly varies is held back by the 1e-10 in the root
        assert out.std((0, 2, 3), correction=0).sub(part.init_scale).abs().max() < 1e-4 * part.init_scale


def test_every_normalization_puts_out_mean_0_and_deviation_1_an_element(images: Tensor) -> None:
    model, noise = initialized(images)
    normalizations = outputs_of(model, Normalization, images, noise)
    assert len(normalizations) == 3
    for _, out in normalizations:
        assert out.mean(0).abs().max() < 1e-10
        assert out.std(0, correction=0).sub(1).abs().max() < 1e-5


def test_initialization_happens_once_and_leaves_the_mode_as_it_was(images: Tensor) -> None:
    torch.manual_seed(1)
    model = FlowPP(CONFIG).train()
    model.initialize(images)
    assert model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.log_prob(images[:32])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_images_and_seeds_give_the_same_model(images: Tensor) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(2)
        model = FlowPP(CONFIG)
        model.initialize(images, torch.Generator().manual_seed(3))
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
