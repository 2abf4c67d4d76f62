"""Whole models: the paper's sizes, exact inverses, log-determinants and the bound, for every ablation."""

import math

import pytest
import torch
from torch import Tensor

from flowpp.config import DequantizerConfig, ModelConfig
from flowpp.model import FlowPP

MIXED = {"filters": 8, "blocks": 1, "components": 3, "heads": 2, "dropout": 0.0}
FLOW = ("columns x2", "squeeze", "channels x1", "columns x1")
DEQUANTIZER = DequantizerConfig(flow=("columns x2",), blocks=1, context_filters=4, context_blocks=1)
SMALL = {"height": 4, "width": 4, "flow": FLOW, "dequantizer": DEQUANTIZER, **MIXED}

ABLATIONS = {
    "Flow++": {},
    "uniform dequantization": {"dequantizer": DequantizerConfig(kind="uniform")},
    "affine coupling": {"coupling": "affine"},
    "no attention": {
        "attention": "maximum",
        "dequantizer": DEQUANTIZER.model_copy(update={"attention": "maximum"}),
    },
    "ImageNet 32": {
        "pointwise": False,
        "weight_norm": True,
        "output_elu": True,
        "dequantizer": DEQUANTIZER.model_copy(update={"flow": ("columns x1", "columns x1"), "context": "attention"}),
    },
    "ImageNet 64": {
        "pointwise": False,
        "output_elu": True,
        "dequantizer": DEQUANTIZER.model_copy(update={"attention": "none", "context": "normalized"}),
    },
    "no pointwise": {"pointwise": False},
    "squeezed dequantizer": {"dequantizer": DEQUANTIZER.model_copy(update={"flow": ("columns x1", "squeeze")})},
    "grey": {"channels": 1},
    "oblong": {"height": 2, "width": 8},
    "1-bit": {"bits": 1},
}


def trained_looking(config: ModelConfig) -> FlowPP:
    """Initialized on random images in float64, then every parameter moved."""
    model = FlowPP(config).double().eval()
    model.initialize(random_images(config, 64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_images(config: ModelConfig, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, config.levels, (n, *config.image_shape), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=ABLATIONS)
def model(request: pytest.FixtureRequest) -> FlowPP:
    torch.manual_seed(0)
    return trained_looking(ModelConfig(**{**SMALL, **ABLATIONS[request.param]}))


def log_det_by_autograd(f: object, x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(f, x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_images_have_no_likelihoods_and_no_latents_no_images(model: FlowPP, dtype: torch.dtype) -> None:
    model.to(dtype)
    assert model.log_prob(random_images(model.config, 0)).shape == (0,)
    assert model.decode(torch.zeros(0, *model.config.latent_shape, dtype=dtype)).shape == (0, *model.config.image_shape)


def test_the_flow_inverts_and_its_log_det_is_the_jacobians(model: FlowPP) -> None:
    v = random_images(model.config, 2) + torch.rand(2, *model.config.image_shape, dtype=torch.float64)
    z, log_det = model.flow(v)
    recovered, inverse_log_det = model.flow.inverse(z)
    assert (recovered - v).abs().max() < 1e-10
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-8)
    for b in range(2):
        assert (log_det[b] - log_det_by_autograd(lambda a: model.flow(a)[0], v[b : b + 1])).abs() < 1e-8


def test_the_dequantizers_log_density_is_the_change_of_variables(model: FlowPP) -> None:
    images, noise = random_images(model.config, 2).double(), model.draw_noise(2)
    u, log_q = model.dequantizer(images, noise)
    assert ((u >= 0) & (u < 1)).all()
    for b in range(2):
        if model.config.dequantizer.kind == "uniform":
            assert log_q[b] == 0
            continue
        one = slice(b, b + 1)
        log_det = log_det_by_autograd(lambda a, one=one: model.dequantizer(images[one], a)[0], noise[one])
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise[b]).sum()
        assert (log_q[b] - (normal - log_det)).abs() < 1e-8


def test_decode_undoes_encode(model: FlowPP) -> None:
    images = random_images(model.config, 16)
    latents = model.encode(images)
    assert latents.shape[1:] == model.config.latent_shape
    assert torch.equal(model.decode(latents), images)


def test_log_weight_is_the_bounds_integrand(model: FlowPP) -> None:
    images, noise = random_images(model.config, 3), model.draw_noise(3)
    u, log_q = model.dequantizer(images.double(), noise)
    z, log_det = model.flow(images + u)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(model.log_weight(images, noise), normal + log_det - log_q)


def test_every_parameter_has_a_gradient(model: FlowPP) -> None:
    model.train()
    model.bits_per_dim(random_images(model.config, 4)).mean().backward()
    for name, parameter in model.named_parameters():
        unread = name.endswith("position") and not parameter.requires_grad
        assert unread == (
            name.startswith("dequantizer")
            and model.config.dequantizer.attention == "none"
            and name.endswith("position")
        )
        assert unread or (parameter.grad is not None and parameter.grad.any()), name


def test_bits_per_dim_is_log_prob_over_d_ln_2(model: FlowPP) -> None:
    images = random_images(model.config, 3)
    log_prob = model.log_prob(images, 4, torch.Generator().manual_seed(5))
    bits_per_dim = model.bits_per_dim(images, 4, torch.Generator().manual_seed(5))
    torch.testing.assert_close(bits_per_dim, -log_prob / (model.config.dimensions * math.log(2)))


def test_samples_are_images_and_a_seed_repeats_them(model: FlowPP) -> None:
    images = model.sample(5, temperature=0.8, seed=3)
    assert images.dtype == torch.uint8
    assert images.shape == (5, *model.config.image_shape)
    assert int(images.max()) < model.config.levels
    assert torch.equal(images, model.sample(5, temperature=0.8, seed=3))
    assert not torch.equal(images, model.sample(5, temperature=0.8, seed=4))


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8, 3)])
def test_images_of_another_size_are_refused_with_both_sizes(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=rf"\(1, {shape[0]}, {shape[1]}, {shape[2]}\).*\(B, 3, 32, 32\)"):
        FlowPP("tiny").log_prob(torch.zeros(1, *shape, dtype=torch.uint8))


def test_images_beyond_the_models_bits_are_refused() -> None:
    model = FlowPP(ModelConfig(**{**SMALL, "bits": 3}))
    with pytest.raises(ValueError, match="a channel value of 8; a 3-bit model's are below 8"):
        model.log_prob(torch.full((1, 3, 4, 4), 8, dtype=torch.uint8))


def test_float_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float32.*torch\.uint8"):
        FlowPP("tiny").log_prob(torch.zeros(1, 3, 32, 32))


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\); the model takes \(B, 12, 16, 16\)"):
        FlowPP("tiny").decode(torch.zeros(1, 3, 32, 32))


def test_log_prob_takes_its_noise_from_the_caller(model: FlowPP) -> None:
    images = random_images(model.config, 3)
    noise = torch.stack([model.draw_noise(3) for _ in range(4)])
    weights = torch.stack([model.log_weight(images, draw) for draw in noise])
    torch.testing.assert_close(model.log_prob(images, noise=noise[0]), weights[0])
    torch.testing.assert_close(model.log_prob(images, noise=noise), weights.logsumexp(0) - math.log(4))
    single = FlowPP(model.config).eval()
    single.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    with torch.no_grad():
        found = single.log_prob(images, noise=noise)  # float64 noise into a float32 model
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, model.log_prob(images, noise=noise).detach(), rtol=1e-4, atol=1e-3)


def test_noise_of_another_shape_is_refused() -> None:
    model = FlowPP(ModelConfig(**SMALL))
    with pytest.raises(ValueError, match=r"noise of shape \(1, 3, 4, 2\) for images of shape \(1, 3, 4, 4\)"):
        model.log_prob(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), noise=torch.zeros(1, 3, 4, 2))


def test_a_bits_map_sums_to_the_weights_bits_and_lies_on_the_image(model: FlowPP) -> None:
    images, noise = random_images(model.config, 3), model.draw_noise(3)
    bits = model.bits_map(images, noise)
    assert bits.shape == images.shape
    total = -model.log_weight(images, noise) / math.log(2)
    torch.testing.assert_close(bits.flatten(1).sum(1), total.detach(), rtol=1e-9, atol=1e-9)


def test_a_bits_map_shows_where_an_image_is_unlikely() -> None:
    """Without couplings the density is a product over the elements, and so must the map be."""
    model = FlowPP(ModelConfig(**{**SMALL, "flow": ("squeeze",), "dequantizer": DequantizerConfig(kind="uniform")}))
    model = model.double()
    model.flow.register_parameter("place", torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    images = torch.full((1, 3, 4, 4), 128, dtype=torch.uint8)
    images[0, 1, 2, 3] = 255
    bits = model.bits_map(images, torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64))
    unlike = (bits - bits[0, 0, 0, 0]).abs() > 1e-9
    assert unlike.nonzero().tolist() == [[0, 1, 2, 3]]


def test_decode_and_sample_have_gradients(model: FlowPP) -> None:
    latents = torch.randn(1, *model.config.latent_shape, dtype=torch.float64, requires_grad=True)
    v = model.decode(latents, continuous=True)
    weight = torch.randn_like(v)
    gradients = torch.autograd.grad((v * weight).sum(), [latents, *model.flow.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    direction = torch.randn_like(latents)
    with torch.no_grad():
        ahead, behind = (model.decode(latents + step * direction, continuous=True) for step in (1e-6, -1e-6))
    difference = ((ahead - behind) * weight).sum() / 2e-6
    torch.testing.assert_close((gradients[0] * direction).sum(), difference, rtol=1e-4, atol=1e-4)
    assert model.sample(2, seed=1, continuous=True).requires_grad
    assert torch.equal(
        model.sample(2, seed=1, continuous=True).floor().clamp(0, model.config.levels - 1).to(torch.uint8),
        model.sample(2, seed=1),
    )


def test_log_density_is_the_flows_and_has_a_gradient(model: FlowPP) -> None:
    images, noise = random_images(model.config, 2), model.draw_noise(2)
    v = model.dequantize(images, noise).detach().requires_grad_()
    terms = model.weight_terms(images, noise)
    torch.testing.assert_close(model.log_density(v), terms.prior + terms.log_det)
    (gradient,) = torch.autograd.grad(model.log_density(v).sum(), v)
    direction = torch.randn_like(v)
    with torch.no_grad():
        difference = (model.log_density(v + 1e-6 * direction) - model.log_density(v - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), difference, rtol=1e-4, atol=1e-4)


def test_encode_keeps_u_away_from_the_boundaries() -> None:
    """Noise at the very ends of the unit interval decodes to the same image nevertheless, in float32."""
    torch.manual_seed(0)
    model = FlowPP(ModelConfig(**{**SMALL, "dequantizer": DequantizerConfig(kind="uniform")})).eval()
    images = random_images(model.config, 16)
    model.initialize(images)
    for end in (0.0, 1 - 2**-24):
        assert torch.equal(model.decode(model.encode(images, noise=torch.full(images.shape, end))), images)
