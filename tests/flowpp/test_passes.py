"""Passes of a model give the same numbers in all module modes, under autocast, and for all types of arguments."""

import copy
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowpp import likelihood, sampling
from flowpp.arguments import NotFinite
from flowpp.config import DequantizerConfig, ModelConfig
from flowpp.dropout import Dropout
from flowpp.model import FlowPP
from tests.flowpp.test_model import ABLATIONS, SMALL, random_images

CONFIG = ModelConfig(**{**SMALL, "dropout": 0.4})


@pytest.fixture(scope="module")
def model() -> FlowPP:
    """In float32 and evaluation mode, with dropout, each parameter moved from its start; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FlowPP(CONFIG).eval()
        model.initialize(random_images(CONFIG, 64))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


IMAGES = random_images(CONFIG, 3)
PIXELS = IMAGES.permute(0, 2, 3, 1).numpy()
NOISE = torch.randn(3, *CONFIG.image_shape, generator=torch.Generator().manual_seed(1))
LATENTS = torch.randn(3, *CONFIG.latent_shape, generator=torch.Generator().manual_seed(2))
V = IMAGES + torch.rand(IMAGES.shape, generator=torch.Generator().manual_seed(3))

PASSES: dict[str, Callable[[FlowPP], Any]] = {
    "log_prob": lambda model: model.log_prob(IMAGES, noise=NOISE),
    "log_prob of several samples": lambda model: model.log_prob(IMAGES, noise=torch.stack((NOISE, -NOISE))),
    "bits_per_dim": lambda model: model.bits_per_dim(IMAGES, generator=torch.Generator().manual_seed(4)),
    "log_weight": lambda model: model.log_weight(IMAGES, NOISE),
    "weight_terms": lambda model: torch.stack(model.weight_terms(IMAGES, NOISE)),
    "dequantize": lambda model: model.dequantize(IMAGES, NOISE),
    "log_density": lambda model: model.log_density(V),
    "bits_map": lambda model: model.bits_map(IMAGES, NOISE),
    "encode": lambda model: model.encode(IMAGES, noise=NOISE),
    "decode": lambda model: model.decode(LATENTS),
    "decode, continuous": lambda model: model.decode(LATENTS, continuous=True),
    "sample": lambda model: model.sample(3, seed=5),
    "sample, continuous": lambda model: model.sample(3, 0.7, seed=5, continuous=True),
    "likelihood": lambda model: torch.from_numpy(np.concatenate(list(likelihood.likelihood(model, PIXELS, 3)))),
    "bits_maps": lambda model: torch.from_numpy(np.concatenate(list(likelihood.bits_maps(model, PIXELS)))),
    "gradients": lambda model: torch.from_numpy(np.concatenate(list(likelihood.gradients(model, PIXELS)))),
    "samples": lambda model: torch.from_numpy(np.concatenate(list(sampling.sample(model, 3)))),
    "latents": lambda model: torch.from_numpy(np.concatenate(list(sampling.encode(model, PIXELS)))),
    "images of latents": lambda model: torch.from_numpy(np.concatenate(list(sampling.decode(model, LATENTS.numpy())))),
    "interpolation": lambda model: torch.from_numpy(np.concatenate(list(sampling.interpolation(model, PIXELS[:2], 4)))),
}


def modes_of(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


MODES: dict[str, Callable[[FlowPP], object]] = {
    "training": lambda model: model.train(),
    "a flow in training": lambda model: model.flow.train(),
    "a dequantizer in training": lambda model: model.dequantizer.train(),
    "dropouts in training": lambda model: [each.train() for each in model.modules() if isinstance(each, Dropout)],
    "only the model in training": lambda model: model.train().flow.eval(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_drops_nothing_in_any_mode_and_leaves_the_mode(model: FlowPP, name: str, mode: str) -> None:
    expected = PASSES[name](model)
    changed = copy.deepcopy(model)
    MODES[mode](changed)
    modes = modes_of(changed)
    found, again = PASSES[name](changed), PASSES[name](changed)
    assert torch.equal(found, again)
    assert torch.equal(found, expected)
    assert modes_of(changed) == modes


@pytest.mark.parametrize("replay", [False, True])
def test_passes_under_replay_drop_nothing_in_training_mode(model: FlowPP, replay: bool) -> None:
    changed = copy.deepcopy(model).requires_grad_(False).train()
    if replay:
        changed.replay()
    for name in ("weight_terms", "encode", "decode, continuous"):
        torch.testing.assert_close(PASSES[name](changed), PASSES[name](model).detach(), rtol=1e-5, atol=1e-4)
        assert torch.equal(PASSES[name](changed), PASSES[name](changed))


@pytest.mark.parametrize("name", ["encode", "log_prob", "decode", "initialize"])
def test_a_pass_that_raises_leaves_the_mode(model: FlowPP, name: str) -> None:
    changed = copy.deepcopy(model)
    changed.flow.train()
    modes = modes_of(changed)
    with pytest.raises(ValueError, match=r"\(7, 7, 7\)"):
        getattr(changed, name)(torch.zeros(7, 7, 7, dtype=torch.float32 if name == "decode" else torch.uint8))
    with torch.no_grad():
        next(changed.flow.parameters()).fill_(math.nan)
    if name != "initialize":  # which gives that parameter another value
        with pytest.raises(NotFinite):
            PASSES[name](changed)
    assert modes_of(changed) == modes


def test_initialization_leaves_mixed_modes(model: FlowPP) -> None:
    changed = copy.deepcopy(model)
    changed.flow.train()
    modes = modes_of(changed)
    changed.initialize(random_images(CONFIG, 16))
    assert modes_of(changed) == modes


@pytest.mark.parametrize("fused", [True, False])
def test_a_training_loss_is_bits_per_dim_under_dropout_of_the_modules_in_training_mode(
    model: FlowPP, fused: bool
) -> None:
    changed = copy.deepcopy(model)
    changed.fuse(fused)
    plain = -changed.log_weight(IMAGES, NOISE).double() / (math.log(2) * CONFIG.dimensions)
    assert torch.equal(changed.training_loss(IMAGES, noise=NOISE), plain)
    changed.train()
    torch.manual_seed(0)
    losses = [changed.training_loss(IMAGES, noise=NOISE) for _ in range(2)]
    assert not torch.equal(*losses)
    assert not torch.equal(losses[0], plain)
    torch.manual_seed(0)
    assert torch.equal(changed.training_loss(IMAGES, noise=NOISE), losses[0])
    seeded = changed.training_loss(IMAGES, noise=NOISE, dropout_seed=7)
    assert torch.equal(changed.training_loss(IMAGES, noise=NOISE, dropout_seed=7), seeded)
    changed.flow.eval()
    halfway = changed.training_loss(IMAGES, noise=NOISE, dropout_seed=7)
    assert not torch.equal(halfway, seeded)
    assert not torch.equal(halfway, plain)
    halfway.mean().backward()
    assert all(parameter.grad is not None for parameter in changed.parameters() if parameter.requires_grad)


def test_threads_that_train_and_score_one_model_do_not_disturb_each_other(model: FlowPP) -> None:
    changed = copy.deepcopy(model).train()
    expected = PASSES["weight_terms"](model)
    loss = changed.training_loss(IMAGES, noise=NOISE, dropout_seed=3)
    together = threading.Barrier(4, timeout=60)

    def work(thread: int) -> bool:
        together.wait()
        for _ in range(10):
            if thread % 2:
                right = torch.equal(PASSES["weight_terms"](changed), expected)
            else:
                right = torch.equal(changed.training_loss(IMAGES, noise=NOISE, dropout_seed=3), loss)
            if not right:
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


CASTS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "without cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("fused", [True, False])
def test_a_pass_gives_the_same_numbers_under_autocast(model: FlowPP, name: str, cast: str, fused: bool) -> None:
    changed = copy.deepcopy(model)
    changed.fuse(fused)
    expected = PASSES[name](changed)
    with CASTS[cast]():
        found = PASSES[name](changed)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("economy", [{}, {"recompute": True}, {"bfloat16": True}])
@pytest.mark.parametrize("coupling", ["mixture", "affine"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_training_step_under_autocast_has_the_gradients_of_one_without(
    economy: dict[str, bool], coupling: str, fused: bool
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**{**dict(CONFIG), "coupling": coupling})
    changed = FlowPP(config)
    changed.initialize(random_images(config, 16))
    changed.fuse(fused)
    changed.economize(**economy)
    parameters = [parameter for parameter in changed.parameters() if parameter.requires_grad]

    def gradients(cast: Any, inside: bool) -> list[Tensor]:
        with cast:
            loss = changed.training_loss(IMAGES, noise=NOISE, dropout_seed=1).mean()
            if inside:
                return list(torch.autograd.grad(loss, parameters))
        return list(torch.autograd.grad(loss, parameters))

    expected = gradients(nullcontext(), inside=False)
    after = gradients(torch.autocast("cpu", torch.bfloat16), inside=False)
    assert all(torch.equal(one, other) for one, other in zip(after, expected, strict=True))
    within = gradients(torch.autocast("cpu", torch.bfloat16), inside=True)  # PyTorch advises against it
    size = torch.cat([each.flatten() for each in expected]).norm()
    off = torch.cat([(one - other).flatten() for one, other in zip(within, expected, strict=True)]).norm()
    assert off < 0.05 * size


def test_initialization_under_autocast_gives_the_same_model() -> None:
    ends = []
    for cast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        torch.manual_seed(0)
        changed = FlowPP(CONFIG)
        with cast:
            changed.initialize(random_images(CONFIG, 16))
        ends.append(changed.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta by default": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_gives_the_same_numbers_in_any_surrounding(
    model: FlowPP, name: str, surrounding: str, replay: bool
) -> None:
    expected = PASSES[name](model).detach()
    changed = copy.deepcopy(model).requires_grad_(False)
    if replay:
        changed.replay()
    with SURROUNDINGS[surrounding]():
        found = PASSES[name](changed)
    assert (found.dtype, found.device) == (expected.dtype, expected.device)
    if found.dtype == torch.uint8:  # rounding can carry a value across a boundary
        assert (found.int() - expected.int()).abs().max() <= 1
    else:
        torch.testing.assert_close(
            found.detach(), expected, rtol=1e-4, atol=1e-4 * float(expected.nan_to_num().abs().max()), equal_nan=True
        )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other element": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "of a larger batch": lambda x: torch.cat([x, x])[3:],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "read-only NumPy memory": lambda x: torch.from_numpy(x.numpy().copy()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_noise_and_latents_may_lie_in_memory_in_any_way(model: FlowPP, layout: str) -> None:
    lay_out = LAYOUTS[layout]
    for function, arguments in (
        (lambda images, noise: model.encode(images, noise=noise), (IMAGES, NOISE)),
        (lambda images, noise: model.log_weight(images, noise), (IMAGES, NOISE)),
        (lambda latents: model.decode(latents, continuous=True), (LATENTS,)),
        (lambda v: model.log_density(v), (V,)),
    ):
        laid = [lay_out(each) for each in arguments]
        expected = function(*(each.contiguous() for each in laid))
        torch.testing.assert_close(function(*laid), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_latents_noise_and_continuous_images_may_be_of_any_floating_dtype(model: FlowPP, dtype: torch.dtype) -> None:
    latents, noise, v = LATENTS.to(dtype), NOISE.to(dtype), V.to(dtype)
    found = model.decode(latents, continuous=True)
    assert found.dtype == torch.float32
    assert torch.equal(found, model.decode(latents.float(), continuous=True))
    assert torch.equal(model.decode(latents), model.decode(latents.float()))
    assert torch.equal(model.encode(IMAGES, noise=noise), model.encode(IMAGES, noise=noise.float()))
    assert torch.equal(model.log_density(v), model.log_density(v.float()))
    leaf = latents.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.decode(leaf, continuous=True).sum(), leaf)
    assert gradient.dtype == dtype
    assert not model.decode(leaf).requires_grad


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, ">f4", ">f8"])
def test_latents_of_numpy_may_be_of_any_floating_dtype(model: FlowPP, dtype: Any) -> None:
    latents = LATENTS.numpy().astype(dtype)
    (found,) = sampling.decode(model, latents)
    (expected,) = sampling.decode(model, latents.astype(np.float32))
    np.testing.assert_array_equal(found, expected)


def test_read_only_and_strided_images_of_numpy_are_taken() -> None:
    config = ModelConfig(**{**SMALL, "channels": 1})
    torch.manual_seed(0)
    model = FlowPP(config)
    model.initialize(random_images(config, 16))
    pixels = random_images(config, 4).permute(0, 2, 3, 1).numpy().copy()
    (expected,) = likelihood.likelihood(model, pixels)
    pixels.flags.writeable = False
    np.testing.assert_array_equal(next(likelihood.likelihood(model, pixels)), expected)
    backwards = pixels[:, ::-1, ::-1].copy()[:, ::-1, ::-1]
    np.testing.assert_array_equal(next(likelihood.likelihood(model, backwards)), expected)


WHOLE_NUMBERS: dict[str, Callable[[int], Any]] = {
    "int": int,
    "int64": np.int64,
    "int8": np.int8,
    "uint8": np.uint8,
    "0-dimensional array": np.array,
    "tensor": torch.tensor,
}


@pytest.mark.parametrize("kind", WHOLE_NUMBERS)
def test_whole_numbers_may_be_of_any_integer_type(model: FlowPP, kind: str) -> None:
    whole = WHOLE_NUMBERS[kind]
    assert torch.equal(model.sample(whole(2), seed=whole(3)), model.sample(2, seed=3))
    drawn = [model.log_prob(IMAGES, k, torch.Generator().manual_seed(1)) for k in (whole(2), 2)]
    assert torch.equal(*drawn)
    scored = [
        np.concatenate(list(likelihood.likelihood(model, PIXELS, k, k, seed, first)))
        for k, seed, first in ((whole(2), whole(4), whole(1)), (2, 4, 1))
    ]
    np.testing.assert_array_equal(*scored)
    samples = [np.concatenate(list(sampling.sample(model, n, seed=n, batch_size=n))) for n in (whole(3), 3)]
    np.testing.assert_array_equal(*samples)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63, 2**64 - 1, np.uint64(2**64 - 1)])
def test_seeds_reach_from_0_to_64_bits(model: FlowPP, seed: Any) -> None:
    assert torch.equal(model.sample(2, seed=seed), model.sample(2, seed=int(seed)))


@pytest.mark.parametrize("kind", [float, np.float32, np.float16, np.float64, np.array, torch.tensor])
def test_temperatures_may_be_of_any_real_type(model: FlowPP, kind: Callable[[float], Any]) -> None:
    assert torch.equal(model.sample(2, kind(0.5), seed=1), model.sample(2, 0.5, seed=1))
    assert torch.equal(model.sample(2, 1, seed=1), model.sample(2, 1.0, seed=1))
    (found,) = sampling.sample(model, 2, kind(0.5))
    np.testing.assert_array_equal(found, next(sampling.sample(model, 2, 0.5)))


NAN, INFINITY = math.nan, math.inf
REFUSED: dict[str, tuple[Callable[[FlowPP], object], str]] = {
    "no importance samples": (lambda model: model.log_prob(IMAGES, 0), "importance_samples is 0; .* at least 1"),
    "fewer than none": (lambda model: model.bits_per_dim(IMAGES, -1), "importance_samples is -1"),
    "half a sample": (lambda model: model.log_prob(IMAGES, 1.5), "importance_samples is 1.5; .* whole number"),
    "a float of NumPy": (lambda model: model.log_prob(IMAGES, np.float64(2)), "whole number"),
    "two tensors": (lambda model: model.log_prob(IMAGES, torch.ones(2, dtype=torch.int64)), "whole number"),
    "other samples than noise": (
        lambda model: model.log_prob(IMAGES, 2, noise=NOISE),
        "importance_samples is 2, and noise holds 1",
    ),
    "noise of no sample": (lambda model: model.log_prob(IMAGES, noise=NOISE[None][:0]), "noise holds 0"),
    "noise and generator": (lambda model: model.log_prob(IMAGES, None, torch.Generator(), noise=NOISE), "not both"),
    "the same to encode": (lambda model: model.encode(IMAGES, torch.Generator(), noise=NOISE), "not both"),
    "the same to a step": (lambda model: model.training_loss(IMAGES, torch.Generator(), noise=NOISE), "not both"),
    "noise of fewer images": (lambda model: model.log_prob(IMAGES, noise=NOISE[:2]), "noise of shape"),
    "whole noise": (lambda model: model.log_prob(IMAGES, noise=NOISE.int()), "noise of torch.int32"),
    "noise of NumPy": (lambda model: model.encode(IMAGES, noise=NOISE.numpy()), "noise is numpy.ndarray"),
    "NaN noise": (lambda model: model.log_prob(IMAGES, noise=NOISE * NAN), "3 of 3 images are not finite"),
    "a negative dropout seed": (lambda model: model.training_loss(IMAGES, dropout_seed=-1), "dropout_seed is -1"),
    "images of NumPy": (lambda model: model.log_prob(PIXELS), "images is numpy.ndarray of uint8 .*torch.from_numpy"),
    "a list of images": (lambda model: model.encode([IMAGES]), "images is a list"),
    "float images": (lambda model: model.log_prob(IMAGES / 255), "images of torch.float32; the model takes"),
    "int64 images": (lambda model: model.encode(IMAGES.long()), "images of torch.int64; the model takes torch.uint8"),
    "one image without a batch": (lambda model: model.log_prob(IMAGES[0]), r"\(3, 4, 4\); .* \(B, 3, 4, 4\)"),
    "channels last": (lambda model: model.log_prob(torch.from_numpy(PIXELS)), r"\(3, 4, 4, 3\); .* \(B, 3, 4, 4\)"),
    "grey images": (lambda model: model.dequantize(IMAGES[:, :1], NOISE[:, :1]), r"\(3, 1, 4, 4\)"),
    "fewer samples than none": (lambda model: model.sample(-1), "n is -1; it must be at least 0"),
    "a float of samples": (lambda model: model.sample(2.0), "n is 2.0; it must be a whole number"),
    "samples in words": (lambda model: model.sample("2"), "n is '2'; it must be a whole number"),
    "a negative seed": (lambda model: model.sample(1, seed=-1), "seed is -1; it must be from 0 to"),
    "a seed of 65 bits": (lambda model: model.sample(1, seed=2**64), "seed is .* must be from 0 to"),
    "a float for a seed": (lambda model: model.sample(1, seed=0.5), "seed is 0.5"),
    "a negative temperature": (lambda model: model.sample(1, -0.1), "temperature is -0.1"),
    "a NaN temperature": (lambda model: model.sample(1, NAN), "temperature is nan; it must be a finite number"),
    "an infinite temperature": (lambda model: model.sample(1, np.float32(INFINITY)), "temperature is .*inf"),
    "a temperature in words": (lambda model: model.sample(1, "0.5"), "temperature is '0.5'"),
    "a temperature beyond all floats": (
        lambda model: model.sample(1, 10**400),
        "temperature is an integer of 1,329 bits",
    ),
    "a seed that Python does not print": (lambda model: model.sample(1, seed=10**5000), "seed is an integer of 16,610"),
    "a temperature on meta": (lambda model: model.sample(1, torch.ones((), device="meta")), "temperature is tensor"),
    "images on meta": (lambda model: model.log_prob(IMAGES.to("meta")), "images is .* on the meta device"),
    "noise on meta": (lambda model: model.encode(IMAGES, noise=NOISE.to("meta")), "noise is .* on the meta device"),
    "sparse latents": (lambda model: model.decode(LATENTS.to_sparse()), "latents is .* takes dense tensors"),
    "sparse images": (lambda model: model.bits_per_dim(IMAGES.to_sparse()), "images is .* takes dense tensors"),
    "a seed for a generator": (lambda model: model.encode(IMAGES, 42), "generator is a int; .* torch.Generator"),
    "the same to initialize": (lambda model: model.initialize(torch.cat([IMAGES, ~IMAGES]), 42), "generator is a int"),
    "noise, and samples in words": (lambda model: model.log_prob(IMAGES, "1", noise=NOISE), "samples is '1'; .* whole"),
    "temperatures": (lambda model: model.sample(1, torch.ones(2)), "temperature is tensor"),
    "a complex temperature": (lambda model: model.sample(1, 1j), "temperature is 1j"),
    "a temperature beyond float32": (lambda model: model.sample(1, 1e300), "latents of 1 of 1 images are not finite"),
    "latents of NumPy": (lambda model: model.decode(LATENTS.numpy()), "latents is numpy.ndarray of float32"),
    "whole latents": (lambda model: model.decode(LATENTS.long()), "latents of torch.int64"),
    "one latent without a batch": (lambda model: model.decode(LATENTS[0]), r"\(12, 2, 2\); .* \(B, 12, 2, 2\)"),
    "flat latents": (lambda model: model.decode(LATENTS.flatten(1)), r"\(3, 48\)"),
    "a NaN latent": (lambda model: model.decode(LATENTS.index_fill(0, torch.tensor(1), NAN)), "1 of 3 images"),
    "infinite latents": (lambda model: model.decode(LATENTS * INFINITY), "the latents of 3 of 3 images"),
    "the negative of them": (lambda model: model.decode(torch.full_like(LATENTS, -INFINITY)), "the latents"),
    "the same, continuous": (lambda model: model.decode(LATENTS * INFINITY, continuous=True), "the latents"),
    "latents beyond float32": (lambda model: model.decode(LATENTS.double() * 1e300), "the latents"),
    "v beyond the domain": (lambda model: model.log_density(V + 400), "log-densities of 3 of 3 .* not finite"),
    "whole v": (lambda model: model.log_density(IMAGES), "v of torch.uint8; .* floating-point"),
    "batches of none": (lambda model: likelihood.likelihood(model, PIXELS, batch_size=0), "batch_size is 0"),
    "no samples of a set": (lambda model: likelihood.likelihood(model, PIXELS, 0), "importance_samples is 0"),
    "a negative seed of a set": (lambda model: likelihood.likelihood(model, PIXELS, seed=-1), "seed is -1"),
    "tensors of a set": (lambda model: likelihood.likelihood(model, IMAGES), "torch.Tensor of torch.uint8"),
    "floats of a set": (
        lambda model: likelihood.likelihood(model, PIXELS / 255),
        "float64 .*expected is a NumPy array",
    ),
    "one image of a set": (lambda model: likelihood.likelihood(model, PIXELS[0]), r"uint8 \[4, 4, 3\]"),
    "a set of other images": (lambda model: likelihood.likelihood(model, PIXELS[:, :2]), "4 pixels wide and 2 high"),
    "maps of floats": (lambda model: likelihood.bits_maps(model, PIXELS / 255), "float64"),
    "gradients of tensors": (lambda model: likelihood.gradients(model, IMAGES), "torch.Tensor"),
    "seeds of other images": (lambda model: likelihood.estimate(model, PIXELS, [1, 2]), "2 seeds for 3 images"),
    "no estimates": (lambda model: likelihood.Likelihood(np.zeros((0, 6)), 48, 1, 0), "N at least 1"),
    "samples in batches of none": (lambda model: sampling.sample(model, 2, batch_size=0), "batch_size is 0"),
    "samples of NaN": (lambda model: sampling.sample(model, 2, NAN), "temperature is nan"),
    "fewer files than none": (lambda model: sampling.sample(model, -2), "n is -2"),
    "tensors to decode": (lambda model: sampling.decode(model, LATENTS), "torch.Tensor of torch.float32"),
    "whole numbers to decode": (lambda model: sampling.decode(model, LATENTS.numpy().astype(int)), "int64"),
    "an array without axes": (lambda model: sampling.decode(model, np.array(1.0)), r"float64 \[\]"),
    "NaN to decode": (lambda model: list(sampling.decode(model, LATENTS.numpy() * NAN)), "not finite"),
    "floats to encode": (lambda model: sampling.encode(model, PIXELS / 1.0), "float64"),
    "a way with one end": (lambda model: sampling.interpolation(model, PIXELS[:1], 3), "1 images; an interpolation"),
    "a way of one image": (lambda model: sampling.interpolation(model, PIXELS[:2], 1), "n is 1"),
    "an unknown preset": (lambda model: FlowPP("smal"), "unknown preset 'smal'; did you mean small"),
    "a capital": (lambda model: FlowPP("cifar-10"), "did you mean cifar10"),
    "no configuration": (lambda model: FlowPP(None), "config is a NoneType; give a ModelConfig"),
    "a dictionary": (lambda model: FlowPP(dict(model.config)), "config is a dict"),
    "a device that is none": (lambda model: FlowPP.load("nowhere", "gpu"), "gpu"),
    "a directory that is none": (lambda model: FlowPP.load("nowhere"), "nowhere is no checkpoint"),
    "weights on meta": (lambda model: copy.deepcopy(model).to("meta").sample(1), "meta device"),
    "half the weights' bits": (lambda model: copy.deepcopy(model).half().sample(1), r"float16, .* model.float\(\)"),
    "the same to score": (lambda model: copy.deepcopy(model).bfloat16().log_prob(IMAGES), "torch.bfloat16"),
    "the same to train": (lambda model: copy.deepcopy(model).half().training_loss(IMAGES), "torch.float16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_arguments_are_refused_in_a_sentence(model: FlowPP, name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises(ValueError, match=sentence):
        call(model)


def test_noise_beyond_the_unit_cube_is_no_uniform_dequantizers() -> None:
    config = ModelConfig(**{**SMALL, "dequantizer": DequantizerConfig(kind="uniform")})
    model = FlowPP(config)
    model.initialize(random_images(config, 16))
    for noise in (NOISE, NOISE * NAN):
        with pytest.raises(ValueError, match=r"noise beyond \[0, 1\]"):
            model.log_prob(IMAGES, noise=noise)
    assert model.encode(IMAGES, noise=torch.zeros(IMAGES.shape)).isfinite().all()


BROKEN: dict[str, Callable[[Tensor], object]] = {
    "NaN": lambda parameter: parameter.fill_(NAN),
    "a NaN": lambda parameter: parameter.flatten()[0].fill_(NAN),
    "infinity": lambda parameter: parameter.fill_(INFINITY),
}


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("way", BROKEN)
@pytest.mark.parametrize("ablation", ["Flow++", "uniform dequantization", "affine coupling", "ImageNet 32", "1-bit"])
def test_a_model_with_weights_that_are_not_finite_raises(ablation: str, way: str, replay: bool) -> None:
    """The first normalization of the flow has them, or the last convolution of its last coupling."""
    config = ModelConfig(**{**SMALL, **ABLATIONS[ablation]})
    torch.manual_seed(0)
    healthy = FlowPP(config).requires_grad_(False)
    images = random_images(config, 16)
    healthy.initialize(images)
    parameters = list(healthy.flow.named_parameters())
    last = next(name for name, _ in reversed(parameters) if name.endswith("proj_out.bias"))
    for name in (parameters[0][0], last):
        model = copy.deepcopy(healthy)
        BROKEN[way](model.flow.get_parameter(name))
        if replay:
            model.replay()
        for call in (
            lambda model=model: model.log_prob(images),
            lambda model=model: model.bits_per_dim(images),
            lambda model=model: model.encode(images),
            lambda model=model: model.sample(8, seed=0),
            lambda model=model: model.sample(8, seed=0, continuous=True),
            lambda model=model: list(sampling.sample(model, 8)),
            lambda model=model: list(sampling.encode(model, images.permute(0, 2, 3, 1).numpy() << (8 - config.bits))),
        ):
            with pytest.raises(NotFinite, match="not finite"):
                call()
        assert not model.training_loss(images).isfinite().all()  # a training step sees it, and skips


def test_empty_batches_are_no_error(model: FlowPP) -> None:
    assert model.sample(0).shape == (0, *CONFIG.image_shape)
    assert model.encode(IMAGES[:0]).shape == (0, *CONFIG.latent_shape)
    assert model.training_loss(IMAGES[:0]).shape == (0,)
    assert model.log_density(V[:0]).shape == (0,)
    assert list(sampling.sample(model, 0)) == list(likelihood.likelihood(model, PIXELS[:0])) == []


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_gives_the_same_numbers(model: FlowPP, replay: bool, copied: Callable[[FlowPP], FlowPP]) -> None:
    first = copy.deepcopy(model).requires_grad_(False)
    if replay:
        first.replay()
        first.encode(IMAGES, noise=NOISE)
    assert torch.equal(copied(first).encode(IMAGES, noise=NOISE), first.encode(IMAGES, noise=NOISE))
