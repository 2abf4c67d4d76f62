"""What `make bench-gpu` measures, how large, and the measuring itself; it runs on any device.

Images are uint8 [N, 32, 32, 3].
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from benchmarks.contenders import MEASURES, Flowpp, interleave_calls, learner_of, timed, to_tensor
from benchmarks.memory import resident
from flowpp import triton_kernels
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.devices import is_out_of_memory
from flowpp.presets import PRESETS
from flowpp.sampling import sample_of_seeds

INITIALIZING = 128

T = TypeVar("T")


class Case(NamedTuple):
    """Training that is measured by itself."""

    name: str
    model: ModelConfig
    batch: int
    precision: str
    recompute: bool

    def recipe(self) -> TrainingConfig:
        options = {"conditioner_precision": self.precision, "activation_checkpointing": self.recompute}
        return TrainingConfig.model_validate({"batch_size": self.batch, **options})


class Plan(NamedTuple):
    """What is measured, and how large. `large` is the model of 64x64 images; `seconds` are those of one figure."""

    model: ModelConfig
    large: ModelConfig
    batches: tuple[int, int]
    large_batch: int
    singles: int
    coupling: tuple[int, int, int, int]
    """[B, C, H, W] of the half that the mixture kernels change."""
    seconds: float
    recipe: TrainingConfig
    window: int
    targets: tuple[float, ...]
    validation: int
    bits_seconds: float
    real: bool
    """Whether the model is `cifar10`, whose arithmetic is known and whose images are to be CIFAR-10's."""

    def cases(self) -> list[Case]:
        small, large = self.batches
        return [
            Case("cifar10", self.model, small, "float32", False),
            Case("cifar10", self.model, small, "bfloat16", False),
            Case("cifar10", self.model, large, "float32", True),
            Case("cifar10", self.model, large, "bfloat16", False),
            Case("cifar10", self.model, large, "bfloat16", True),
            Case("imagenet64", self.large, self.large_batch, "bfloat16", True),
        ]


FULL = Plan(
    model=PRESETS["cifar10"].model,
    large=PRESETS["imagenet64"].model,
    batches=(64, 512),
    large_batch=32,
    singles=50,
    coupling=(512, 3, 32, 16),
    seconds=6,
    recipe=TrainingConfig(
        batch_size=64, learning_rate=6e-4, warmup_steps=500, ema_decay=0.99, conditioner_precision="bfloat16"
    ),
    window=10_240,
    targets=(3.8, 3.6),
    validation=1_024,
    bits_seconds=180,
    real=True,
)

SMOKE = Plan(
    model=PRESETS["tiny"].model,
    large=PRESETS["tiny"].model.with_image_shape((3, 64, 64)),
    batches=(2, 3),
    large_batch=1,
    singles=3,
    coupling=(1, 1, 2, 3),
    seconds=0,
    recipe=PRESETS["tiny"].training.model_copy(update={"steps": 1_000}),
    window=16,
    targets=(7.95, 7.6),
    validation=8,
    bits_seconds=3,
    real=False,
)


class Trained(NamedTuple):
    """Images/s of a training step, and its peak of memory in GB."""

    rate: float
    peak: float


def train(case: Case, images: np.ndarray, device: torch.device, seconds: float) -> Trained:
    """Of a case, on mosaics where its images are larger. On a CPU the peak is that of the whole process so far."""
    fitted = enlarged(images[: max(case.batch, INITIALIZING)], case.model.height)
    learner = learner_of(case.model, case.recipe(), device, to_tensor(fitted[:INITIALIZING]))
    ours = Flowpp(learner, fitted[: case.batch])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = interleave_calls([ours.train], seconds, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    return Trained(case.batch / float(np.median(times)), peak / 1e9)


def enlarged(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, h, w, C] -> [N, size, size, C], each a mosaic of images that follow one another."""
    factor = size // images.shape[1]
    rows = (
        np.concatenate([np.roll(images, -(row * factor + column), axis=0) for column in range(factor)], axis=2)
        for row in range(factor)
    )
    return np.concatenate(list(rows), axis=1)


def inference(plan: Plan, images: np.ndarray, device: torch.device) -> dict[tuple[str, int], float | None]:
    """Images/s of likelihood and sampling, by batch."""
    rates: dict[tuple[str, int], float | None] = {}
    learner = learner_of(plan.model, plan.cases()[0].recipe(), device, to_tensor(images[:INITIALIZING]))
    for measure in ("likelihood", "sampling"):
        for batch in plan.batches:
            call = partial(MEASURES[measure], Flowpp(learner, images[:batch]))
            times = fitting(partial(interleave_calls, [call], plan.seconds, device))
            rates[measure, batch] = None if times is None else batch / float(np.median(times))
    return rates


def latencies(plan: Plan, images: np.ndarray, device: torch.device) -> tuple[float, float]:
    """p50 and p99 in seconds of a single sample."""
    learner = learner_of(plan.model, plan.cases()[0].recipe(), device, to_tensor(images[:INITIALIZING]))
    times = [timed(partial(sample_of_seeds, learner.ema, [seed]), device) for seed in range(3 + plan.singles)][3:]
    return float(np.quantile(times, 0.5)), float(np.quantile(times, 0.99))


class Kernel(NamedTuple):
    """A mixture kernel on float32: seconds a call, and the bytes that it must read and write."""

    name: str
    seconds: float
    size: int


def kernels(plan: Plan, device: torch.device) -> list[Kernel]:
    """Of `flowpp.triton_kernels`, on `plan.coupling`; interpreted where the device is no GPU."""
    (b, c, height, width), k = plan.coupling, plan.model.components
    generator = torch.Generator(device).manual_seed(0)
    x, grad, grad_terms = torch.randn(3, b, c, height, width, device=device, generator=generator)
    h = torch.randn(b, c * (2 + 3 * k), height, width, device=device, generator=generator)
    h = h.contiguous(memory_format=torch.channels_last)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "value": (partial(triton_kernels.couple, x, h, k), 3 * x.nbytes + h.nbytes),
        "gradient": (
            partial(triton_kernels.couple_backward, grad, grad_terms, x, h, k),
            4 * x.nbytes + 2 * h.nbytes,
        ),
        "inverse": (partial(triton_kernels.uncouple, x, h, k), 3 * x.nbytes + h.nbytes),
    }
    repeats = 20 if device.type == "cuda" else 1  # a launch is to be no part of a kernel's time

    def repeat(call: Callable[[], object]) -> None:
        for _ in range(repeats):
            call()

    found = []
    for name, (call, size) in calls.items():
        times = interleave_calls([partial(repeat, call)], plan.seconds / 3, device)
        found.append(Kernel(name, float(np.median(times)) / repeats, size))
    return found


def fitting(measure: Callable[[], T]) -> T | None:
    """What it measures; none where the device's memory does not do."""
    try:
        return measure()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
