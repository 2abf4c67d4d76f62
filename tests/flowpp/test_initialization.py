"""Data-dependent initialization: one pass gives every part the mean and deviation that were asked for."""

import pytest
import torch
from torch import Tensor, nn

from flowpp.conditioner import Convolution
from flowpp.config import ModelConfig
from flowpp.initialization import TooFewImages, initializing, inverse_deviation
from flowpp.model import FlowPP
from flowpp.presets import PRESETS, resolve_model
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


def kinds_of_images(n: int) -> dict[str, Tensor]:
    """uint8 [n, 3, 8, 8] with at least four different images, some with little spread."""
    generator = torch.Generator().manual_seed(n)
    noise = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    margins, channel, dark, dotted = noise.clone(), noise.clone(), noise // 128, torch.zeros_like(noise)
    margins[:, :, [0, 1, 6, 7]] = 0
    margins[:, :, :, [0, 1, 6, 7]] = 0
    channel[:, 1] = 128
    dotted[torch.arange(n), 0, 3, torch.arange(n) % 8] = 255
    four = noise[:4].repeat(-(-n // 4), 1, 1, 1)[:n]
    return {"noise": noise, "margins": margins, "one channel": channel, "dark": dark, "a dot": dotted, "four": four}


@pytest.mark.parametrize(
    "changes", [{}, {"weight_norm": True}, {"coupling": "affine"}, {"dequantizer": {"kind": "uniform"}}]
)
@pytest.mark.parametrize("kind", kinds_of_images(4))
@pytest.mark.parametrize("n", [4, 5, 16, 64])
def test_a_new_model_begins_near_the_cost_of_a_uniform_code(n: int, kind: str, changes: dict[str, object]) -> None:
    """8 bits/dim, and less where the images have elements that do not vary. Two images gave hundreds."""
    torch.manual_seed(0)
    images = kinds_of_images(n)[kind]
    model = FlowPP(resolve_model("tiny", changes, (3, 8, 8)))
    model.initialize(images)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        assert model.bits_per_dim(images).mean() < 10
        assert model.bits_per_dim(images, generator=torch.Generator().manual_seed(1)).mean() < 16
        if kind == "noise":
            assert model.bits_per_dim(kinds_of_images(65)["noise"]).mean() < 16


FEW = {
    "no image": lambda images: images[:0],
    "one image": lambda images: images[:1],
    "two images": lambda images: images[:2],
    "three images": lambda images: images[:3],
    "one image 64 times": lambda images: images[:1].expand(64, -1, -1, -1),
    "two images many times": lambda images: images[:2].repeat(30, 1, 1, 1),
    "black images": torch.zeros_like,
    "grey images": lambda images: torch.full_like(images, 128),
}


@pytest.mark.parametrize("name", FEW)
def test_fewer_than_four_different_images_are_refused_and_change_nothing(images: Tensor, name: str) -> None:
    model = FlowPP(CONFIG)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TooFewImages, match="at least 4 different images"):
        model.initialize(FEW[name](images))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_part_that_sees_no_spread_keeps_its_scale(dtype: torch.dtype) -> None:
    """Constant inputs, also such that rounding makes them vary a little."""
    for value in (0.0, 0.1, 1e4):
        x = torch.full((64, 4, 3, 3), value, dtype=dtype)
        normalization, convolution = Normalization((4, 3, 3)).to(dtype), Convolution(4, 5, 1).to(dtype)
        weight = convolution.weight.detach().clone()
        for part in (normalization, convolution):
            with initializing(part):
                out = part(x)
            assert (out[0] if isinstance(out, tuple) else out).isfinite().all()
        assert torch.equal(normalization.gain, torch.ones_like(normalization.gain))
        assert convolution.weight.abs().max() <= 1e4 * weight.abs().max()
        torch.testing.assert_close(normalization(x)[0], torch.zeros_like(x), rtol=0, atol=1e-5 * max(1, value))


def test_a_spread_above_the_bound_is_scaled_as_the_authors_do() -> None:
    variance = torch.tensor([1e-7, 1e-4, 1.0, 1e6])
    assert torch.equal(inverse_deviation(variance, 1e-8), torch.rsqrt(variance + 1e-8))
    assert torch.equal(inverse_deviation(torch.tensor([0.0, 1e-9, 1e-8]), 1e-8), torch.ones(3))
