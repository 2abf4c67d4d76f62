"""Training for less: bfloat16 conditioners, couplings computed anew, and what memory a run is said to take."""

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowpp.batches import Batches
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.data import ImageSet
from flowpp.learner import Learner
from flowpp.likelihood import to_symbols
from flowpp.memory import Memory, advice, count_parameters, estimate, micro_batch
from flowpp.model import FlowPP
from flowpp.native import kernels
from flowpp.presets import PRESETS, resolve_model, resolve_training
from flowpp.processes import Processes
from flowpp.weights import load_model
from tests.levels import levels_here

GATE = 0.002
"""bits/dim that bfloat16 conditioners may shift a likelihood by (issue: under 0.002)."""


def devices() -> list[Any]:
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", devices())
def test_bfloat16_conditioners_shift_bits_per_dim_by_less_than_the_gate(
    device: str, finished_run: Path, image_set: ImageSet
) -> None:
    model = load_model(FlowPP, finished_run / "checkpoints" / "step-00000020", device)
    images = to_symbols(image_set.images, model)
    noise = model.draw_noise(len(images), torch.Generator(device).manual_seed(0))
    exact = model.log_prob(images, noise=noise)
    model.economize(bfloat16=True)
    shift = (model.log_prob(images, noise=noise) - exact) / (math.log(2) * model.config.dimensions)
    assert 0 < shift.abs().max() < 5 * GATE
    assert shift.mean().abs() < GATE


def test_outside_the_conditioners_and_in_their_last_layer_nothing_is_bfloat16(image_set: ImageSet) -> None:
    model = FlowPP(resolve_model("tiny", {}, image_set.shape))
    model.economize(bfloat16=True)
    seen: dict[str, torch.dtype] = {}

    def remember(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output.dtype if isinstance(output, Tensor) else 0})

    for name, module in model.named_modules():
        if isinstance(module, nn.Module) and name.endswith(("proj_in", "proj_gate", "proj_out", "conditioner")):
            module.register_forward_hook(remember(name))
    loss = model.log_prob(to_symbols(image_set.images[:4], model)).sum()
    loss.backward()
    inner = {dtype for name, dtype in seen.items() if name.endswith(("proj_in", "proj_gate"))}
    outer = {dtype for name, dtype in seen.items() if name.endswith(("proj_out", "conditioner"))}
    assert (inner, outer) == ({torch.bfloat16}, {torch.float32})
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_training_in_bfloat16_evaluates_in_float32_and_ends_near_training_in_float32(image_set: ImageSet) -> None:
    model = resolve_model("tiny", {}, image_set.shape)
    scores = {}
    for precision in ("float32", "bfloat16"):
        recipe = resolve_training("tiny", {"steps": 60, "warmup_steps": 5, "conditioner_precision": precision})
        learner = trained(model, recipe, image_set, 60)
        images = to_symbols(image_set.validation, learner.ema)
        noise = learner.ema.draw_noise(len(images), torch.Generator().manual_seed(0))
        scores[precision] = bits_per_dim(learner.ema, images, noise)
        learner.ema.economize(bfloat16=False)
        assert bits_per_dim(learner.ema, images, noise) == scores[precision], "the average is not reduced"
    assert scores["bfloat16"] == pytest.approx(scores["float32"], abs=0.05)


def bits_per_dim(model: FlowPP, images: Tensor, noise: Tensor) -> float:
    return float(model.log_prob(images, noise=noise).mean()) / (-math.log(2) * model.config.dimensions)


def trained(model: ModelConfig, recipe: TrainingConfig, image_set: ImageSet, steps: int) -> Learner:
    learner = Learner(model, recipe, Processes(0, 1, torch.device("cpu")))
    batches = Batches(image_set.training, recipe, learner.processes)
    learner.initialize(to_symbols(batches.first(), learner.model))
    for _ in range(steps):
        learner.take_step(to_symbols(batches.after(learner.images_seen), learner.model))
    return learner


def test_what_is_computed_anew_gives_the_same_run_bit_for_bit(image_set: ImageSet) -> None:
    model = resolve_model("tiny", {"dropout": 0.2}, image_set.shape)
    ends = []
    for recompute in (False, True):
        recipe = resolve_training("tiny", {"activation_checkpointing": recompute, "micro_batch_size": 3})
        ends.append(trained(model, recipe, image_set, 4).model.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def kept_bytes(model: FlowPP, images: int) -> int:
    """What autograd keeps for the backward pass, beside parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept[place] = tensor
        return tensor

    symbols = torch.randint(0, model.config.levels, (images, *model.config.image_shape), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.training_loss(symbols)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny", {}),
        ("small", {}),
        ("small", {"dropout": 0.2}),
        ("small", {"coupling": "affine", "components": 32}),
        ("cifar10", {"blocks": 1}),
        ("cifar10", {"blocks": 2, "attention": "maximum"}),
        ("cifar10", {"blocks": 1, "dequantizer": {"kind": "uniform"}}),
        ("imagenet64", {"blocks": 1}),
    ],
)
def test_the_estimate_of_what_an_image_takes_is_near_what_autograd_keeps(
    preset: str, changes: dict[str, Any], fused: bool
) -> None:
    if fused and not levels_here():
        pytest.skip("there are no kernels")
    config = resolve_model(preset, changes, PRESETS[preset].model.image_shape)
    model = FlowPP(config).train()
    model.fuse(fused)
    measured = kept_bytes(model, 2) - kept_bytes(model, 1)
    fused = fused and kernels(torch.float32) is not None
    estimated = estimate(config, TrainingConfig(compile=fused)).per_image
    wide = (3 if fused else 14) * config.components if config.coupling == "mixture" else 0
    temporary = 4 * wide * largest_half(config)
    assert (estimated - temporary) / measured == pytest.approx(1, abs=0.1)


def largest_half(config: ModelConfig) -> int:
    """Channel values of the half that a coupling changes; all have as many."""
    return config.dimensions // 2


def test_computing_anew_keeps_a_fraction() -> None:
    model = FlowPP("small").train()
    all_of_it = kept_bytes(model, 2)
    model.economize(recompute=True)
    assert kept_bytes(model, 2) < all_of_it / 4


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_counted_exactly(preset: str) -> None:
    with torch.device("meta"):
        model = FlowPP(preset)
    assert count_parameters(PRESETS[preset].model) == sum(parameter.numel() for parameter in model.parameters())


def test_a_64x64_model_at_batch_32_fits_into_24_gib_with_activation_checkpointing() -> None:
    recipe = PRESETS["imagenet64"].training.model_copy(update={"batch_size": 32, "activation_checkpointing": True})
    assert estimate(PRESETS["imagenet64"].model, recipe).at(32) < 24 * 2**30 / 2


def test_the_images_of_a_forward_pass_are_a_processes_share_or_less() -> None:
    recipe = TrainingConfig(batch_size=100, num_processes=3)
    assert micro_batch(recipe) == 34
    assert micro_batch(recipe.model_copy(update={"micro_batch_size": 8})) == 8


@pytest.mark.parametrize(
    ("available", "words"),
    [
        (
            15,
            r"micro_batch_size \d+ would fit and give the same gradients, and training.activation_checkpointing would",
        ),
        (1.9, r"take about 11.2 GiB, of 1.9 GiB there are; training.micro_batch_size 3 would fit"),
        (0.1, "not even one image fits: choose a smaller model"),
    ],
)
def test_advice_names_what_would_fit(available: float, words: str) -> None:
    preset = PRESETS["cifar10"]
    recipe = preset.training.model_copy(update={"batch_size": 128} if available == 15 else {})
    with_room = Memory(fixed=10, per_image=5)
    assert (with_room.at(3), with_room.most_images(27), with_room.most_images(3)) == (25, 3, 0)
    assert re.search(words, advice(preset.model, recipe, available * 2**30))


def test_a_run_that_gets_no_memory_fails_as_out_of_memory_with_what_it_takes(tmp_path: Path, images_file: Path) -> None:
    """With a limit on the address space, as containers and batch systems set one."""
    limit = 2**32

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    wide = ["model.filters=64", "model.blocks=16", "training.batch_size=4096", "training.init_batch_size=4"]
    stated = ["training.micro_batch_size=4096", "training.activation_checkpointing=false"]
    sets = [part for change in [*wide, *stated] for part in ("--set", change)]
    command = [sys.executable, "-m", "flowpp", "train", tmp_path / "run", "--data", images_file, "--preset", "tiny"]
    done = subprocess.run([*map(str, command), *sets], preexec_fn=bounded, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["code"]) == ("failed", "out_of_memory")
    assert "4,096 images a forward pass take about" in result["message"]
    assert "out of memory on cpu" in done.stderr
