"""How much memory training takes, estimated from the configuration alone; `benchmarks/memory.py` measures the error.

Counted are the tensors that are kept for the backward pass, in float32 values a position of a feature map: what the
kernels of `flowpp.fused` keep, or, where a run does without them, torch 2.13's autograd. Needs no torch.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flowpp.config import HEAD_SIZES, LEAST_IMAGES, Attention, ModelConfig, TrainingConfig, flow_shape, stage_couplings

_BYTES = 4
_COPIES = 6
"""Of the parameters: weights, gradients, which processes send from where they lie, Adam's two moments, the average,
and what a step of the optimizer needs."""

_NORMALIZED_COPIES = 2
"""More of them under weight normalization, for the backward pass."""

_MIXTURE_TEMPORARIES = 14
"""Of a coupling's mixture, as wide as its components, in its backward pass; its kernel has the gradients alone, 3."""

_DROPPED = 1.25
"""What dropout behind attention without a kernel keeps: values, and a byte each of what was dropped."""

_TORCH = 2**28
"""Bytes of a process that has loaded torch and done nothing; of a GPU's memory, none."""

_KEPT_BACK = 2**28
"""Bytes of freed memory that a process keeps for its next pass, as `flowpp.native` has it with kernels."""

EVALUATION_BATCH = 32
"""Images of a process between two looks at whether to stop an evaluation."""

_INITIAL_COPIES = 2
"""Of the parameters, when the first images pass: weights and average."""

_BFLOAT16_SHARE = 0.65
"""Of the values of a conditioner's blocks in bytes, where they are bfloat16: layer norms keep float32."""

_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"
"""Of a control group, by the second and the first version of the interface."""


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes in a process: `fixed`, and `per_image` of a forward pass.

    And at `least` what the initialization and evaluations take, whose passes keep nothing for a backward pass.
    """

    fixed: float
    per_image: float
    least: float = 0

    def at(self, images: int) -> float:
        """Bytes with so many images a forward pass."""
        return max(self.least, self.fixed + self.per_image * images)

    def most_images(self, available: float) -> int:
        """Images a forward pass that fit into so many bytes; 0 where not even one does."""
        return max(0, int((available - self.fixed) // self.per_image)) if self.least <= available else 0


@dataclass(frozen=True)
class _Part:
    """Of one coupling or network: parameters; values kept for the backward pass, of an image; of those, the blocks'.

    `passing` are the values of an image at once in a pass that keeps none.
    """

    parameters: int
    kept: float
    in_blocks: float = 0
    temporary: float = 0
    passing: float = 0
    coupling: bool = False


def micro_batch(training: TrainingConfig) -> int:
    """Images of a forward pass of a process."""
    share = _share(training)
    return min(share, training.micro_batch_size or share)


def most_images(model: ModelConfig, training: TrainingConfig, available: float, *, cuda: bool = False) -> int:
    """Images a forward pass that fit into so many bytes, of a share that passes in several; 0 where not one does."""
    several = training.model_copy(update={"micro_batch_size": 1})
    return min(_share(training), estimate(model, several, cuda=cuda).most_images(available))


def _share(training: TrainingConfig) -> int:
    """Images of a batch that are one process's."""
    return -(-training.batch_size // training.num_processes)


def estimate(model: ModelConfig, training: TrainingConfig, *, cuda: bool = False) -> Memory:
    """What one process of a run takes, torch itself included; on a GPU, whose conditioners have no kernels, more."""
    fused = training.compile and training.conditioner_precision == "float32" and not cuda
    parts = list(_parts(model, fused))
    parameters = sum(part.parameters for part in parts)
    reduced = 1 - _BFLOAT16_SHARE if training.conditioner_precision == "bfloat16" else 0
    kept = [part.kept - reduced * part.in_blocks for part in parts]
    if training.activation_checkpointing:
        recomputed = [values for part, values in zip(parts, kept, strict=True) if part.coupling]
        kept = [values for part, values in zip(parts, kept, strict=True) if not part.coupling]
        kept.append(2 * max(recomputed))  # its values, and gradients beside them
    per_image = sum(kept) + max(part.temporary for part in parts)
    copies = _COPIES + (_NORMALIZED_COPIES if model.weight_norm else 0)
    copies += 1 if micro_batch(training) < _share(training) else 0  # gradients of the passes before
    torch, kept_back, weights = 0 if cuda else _TORCH, _KEPT_BACK if fused else 0, _BYTES * parameters

    def without_gradients(images: int) -> float:
        passing = images * _BYTES * max(part.passing for part in parts)
        return passing + min(kept_back, passing)

    initialization = _INITIAL_COPIES * weights + without_gradients(training.init_batch_size)
    evaluation = copies * weights + without_gradients(EVALUATION_BATCH)
    fixed = torch + copies * weights + kept_back
    return Memory(fixed, _BYTES * per_image, torch + max(initialization, evaluation))


def advice(model: ModelConfig, training: TrainingConfig, available: float, *, cuda: bool = False) -> str:
    """What a run takes of `available` bytes and what would fit, in words."""
    room = allowed(training, available)
    bound = "that training.memory_gib allows" if room < available else "there are"
    needed, images = estimate(model, training, cuda=cuda), micro_batch(training)
    said = f"{images:,} images a forward pass take about {gib(needed.at(images))}, of {gib(room)} {bound}"
    fitting = min(images, most_images(model, training, room, cuda=cuda))
    if needed.at(images) <= room:
        plans = "leave training.micro_batch_size open and choose a training.memory_gib below that"
        return f"{said}, so that it should fit; where other processes take memory, too, {plans}"
    frugal = training.model_copy(update={"activation_checkpointing": True})
    with_recomputation = min(images, most_images(model, frugal, room, cuda=cuda))
    ways = []
    if fitting:
        ways.append(f"training.micro_batch_size {fitting:,} would fit and give the same gradients")
    if with_recomputation > fitting:
        way = f"training.activation_checkpointing would make room for {with_recomputation:,} images"
        ways.append(way if with_recomputation == images else f"{way} (micro_batch_size)")
    if not ways:
        smallest = frugal.model_copy(update={"init_batch_size": LEAST_IMAGES})
        if most_images(model, smallest, room, cuda=cuda):
            ways.append(f"training.init_batch_size {training.init_batch_size:,} is too large: choose a smaller one")
        else:
            ways.append("not even one image fits: choose a smaller model")
    return f"{said}; {', and '.join(ways)}"


def allowed(training: TrainingConfig, available: float) -> float:
    """Bytes that a process may take, of so many."""
    return available if training.memory_gib is None else min(available, training.memory_gib * 2**30)


def of_machine() -> int:
    """Bytes of this machine's memory, or of what its control group may use."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(Path, _LIMITS):
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            available = min(available, int(text))
    return available


def gib(size: float) -> str:
    """A size in words."""
    return f"{size / 2**30:,.{1 if size < 100 * 2**30 else 0}f} GiB"


def count_parameters(model: ModelConfig) -> int:
    """Of the whole model."""
    return sum(part.parameters for part in _parts(model, fused=True))


def _parts(model: ModelConfig, fused: bool) -> Iterator[_Part]:
    channels, height, width = model.image_shape
    image = model.dimensions
    yield _Part(0, 8 * image)  # logit, sigmoid, priors
    declared = model.dequantizer
    if declared.kind == "variational":
        attention: Attention = "softmax" if declared.context == "attention" else "none"
        context = _Network(
            model, declared.context_filters, attention, norm=declared.context != "convolution", fused=fused
        )
        places = height * width // 2
        parameters = context.convolution(2 * channels, declared.context_filters, 3)
        parameters += context.block_parameters(gate_kernel=3) * declared.context_blocks
        parameters += declared.context_filters * places * (attention != "none")
        kept = places * (2 * channels + context.block_values() * declared.context_blocks)
        in_blocks = places * context.block_values() * declared.context_blocks
        yield _Part(parameters, kept, in_blocks, passing=places * (2 * channels + context.block_values()))
        filters = declared.context_filters
        yield from _flow(model, declared.flow, declared.blocks, declared.attention, filters, fused)
    yield from _flow(model, model.flow, model.blocks, model.attention, 0, fused)


def _flow(
    model: ModelConfig, flow: tuple[str, ...], blocks: int, attention: Attention, context: int, fused: bool
) -> Iterator[_Part]:
    shape = model.image_shape
    for stage in flow:
        channels, height, width = shape
        if stage.startswith("columns"):
            half, places = channels, height * width // 2
        else:
            half, places = channels // 2, height * width
        for _ in range(stage_couplings(stage)):
            yield from _coupling(model, half, places, blocks, attention, context, fused)
        shape = flow_shape((stage,), shape)


def _coupling(
    model: ModelConfig, half: int, places: int, blocks: int, attention: Attention, context: int, fused: bool
) -> Iterator[_Part]:
    network = _Network(model, model.filters, attention, norm=True, fused=fused)
    widths = 2 if model.coupling == "affine" else 2 + 3 * model.components
    last = model.filters * (2 if model.output_elu else 1)
    outside = 2 * half * 2 * places + (2 * half * half if model.pointwise else 0)
    yield _Part(outside, 4 * half * places)  # normalization and pointwise
    parameters = network.convolution(half, model.filters, 3) + network.convolution(last, widths * half, 3)
    parameters += network.block_parameters(gate_kernel=1, context=context) * blocks + model.filters * places
    in_blocks = places * blocks * (network.block_values() + (0 if fused else 4 * context))
    before_last = 1 if fused or not model.output_elu else 4
    ends = places * (half + model.filters * before_last + half * (widths + (3 if fused else 8)))
    wide = 3 if fused else _MIXTURE_TEMPORARIES
    temporary = wide * half * model.components * places if model.coupling == "mixture" else 0
    passing = (in_blocks / blocks if blocks else 0) + ends + temporary
    yield _Part(parameters, in_blocks + ends, in_blocks, temporary, passing, coupling=True)


@dataclass(frozen=True)
class _Network:
    """Blocks of `filters`, as in `flowpp.conditioner`."""

    model: ModelConfig
    filters: int
    attention: Attention
    norm: bool
    fused: bool

    def convolution(self, channels: int, filters: int, kernel: int) -> int:
        """Parameters."""
        return filters * (channels * kernel * kernel + (2 if self.model.weight_norm else 1))

    def block_parameters(self, gate_kernel: int, context: int = 0) -> int:
        filters = self.filters
        norms = (1 if self.norm else 0) + (1 if self.attention != "none" else 0)
        count = self.convolution(2 * filters, filters, 3) + self.convolution(2 * filters, 2 * filters, gate_kernel)
        count += 2 * filters * norms
        if context:
            count += self.convolution(2 * context, filters, 1)
        if self.attention != "none":
            count += self.convolution(filters, 3 * filters, 1) + self.convolution(filters, 2 * filters, 1)
        return count

    def block_values(self) -> float:
        """Kept for the backward pass, of one position."""
        if self.fused:
            return self._fused_values()
        dropout = 1 if self.model.dropout else 0
        gated = 10 + 2 * dropout + (1 if self.norm else 0)
        attended = {"softmax": 9, "maximum": 8, "none": 0}[self.attention]
        return self.filters * (gated + attended + (dropout if attended else 0))

    def _fused_values(self) -> float:
        """Input, what lies between the convolutions and two gates of a gated convolution; of attention, likewise."""
        gated = 4
        dropped = _DROPPED if self.model.dropout and not self._has_kernel else 0
        attended = 0 if self.attention == "none" else 8 + dropped
        sums = self.model.heads if self.attention == "softmax" else 0
        return self.filters * (gated + attended) + sums

    @property
    def _has_kernel(self) -> bool:
        return self.attention == "softmax" and self.filters // self.model.heads in HEAD_SIZES
