"""The two that are measured beside each other, the plain baseline and flowpp, with one model and one batch of images.

Each trains by a whole step, scores the batch and samples as many images. Timings alternate between them, so that
whatever else the machine does meets both.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks import baseline
from flowpp import FlowPP
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.learner import Learner
from flowpp.likelihood import COLUMNS, estimate, to_symbols
from flowpp.processes import Processes
from flowpp.sampling import latent_of_seed, sample_of_seeds
from flowpp.seeds import seed_of

LEARNING_RATE = 1e-6
"""Of the baseline: a measured model is to stay what it is, and what a step costs does not depend on it."""

TOLERANCE = 1e-4
"""Of log-likelihoods, relative: what float32 loses in sums of thousands of terms, and no more."""

LEAST_ROUNDS, MOST_ROUNDS = 3, 100


class Contender(Protocol):
    """What is measured. `images` are uint8 [B, H, W, C]."""

    images: np.ndarray

    def train(self) -> None:
        """One step on the images."""

    def score(self) -> np.ndarray:
        """log P of the images in nats, float64 [B], under one draw of the dequantizer, the same in each call."""

    def sample(self) -> np.ndarray:
        """Images, uint8 [B, H, W, C], of the same latents in each call."""


class Baseline:
    """`benchmarks.baseline` on a model of its own, with plain Adam."""

    def __init__(self, model: FlowPP, images: np.ndarray) -> None:
        self.model = model
        self.images = images
        self.symbols = to_symbols(images, model)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def train(self) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        noise = self.model.draw_noise(len(self.symbols))
        (-baseline.log_prob(self.model, self.symbols, noise).mean()).backward()
        self.optimizer.step()

    @torch.no_grad()
    def score(self) -> np.ndarray:
        self.model.eval()
        device = self.symbols.device
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds(self.images)]
        noise = torch.cat([self.model.draw_noise(1, generator) for generator in generators])
        return baseline.log_prob(self.model, self.symbols, noise).double().cpu().numpy()

    def sample(self) -> np.ndarray:
        self.model.eval()
        latents = torch.cat([latent_of_seed(self.model, seed) for seed in seeds(self.images)])
        v = baseline.decode(self.model, latents)
        levels = self.model.config.levels
        return v.floor().clamp(0, levels - 1).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


class Flowpp:
    """flowpp as it is used: a learner's steps, and its average's likelihoods and samples."""

    def __init__(self, learner: Learner, images: np.ndarray) -> None:
        self.learner = learner
        self.images = images
        self.symbols = to_symbols(images, learner.model)

    def train(self) -> None:
        self.learner.take_step(self.symbols)

    def score(self) -> np.ndarray:
        return estimate(self.learner.ema, self.images, seeds(self.images))[:, COLUMNS.index("log_prob")]

    def sample(self) -> np.ndarray:
        return sample_of_seeds(self.learner.ema, seeds(self.images))


MEASURES: dict[str, Callable[[Contender], object]] = {
    "training": lambda contender: contender.train(),
    "likelihood": lambda contender: contender.score(),
    "sampling": lambda contender: contender.sample(),
}
"""By what name each is shown. Steps are too small to change what the other two cost."""


def seeds(images: np.ndarray) -> list[int]:
    """Of the dequantizer's noise, and of the latents: one an image."""
    return [seed_of(0, index) for index in range(len(images))]


def learner_of(model: ModelConfig, training: TrainingConfig, device: torch.device, start: Tensor | FlowPP) -> Learner:
    """A learner that is initialized from images, uint8 [B, C, H, W], or has the weights of a model."""
    learner = Learner(model, training, Processes(0, 1, device))
    if isinstance(start, Tensor):
        learner.initialize(start)
    else:
        learner.model.load_state_dict(start.state_dict())
        learner.ema.load_state_dict(start.state_dict())
    return learner


def without_kernels(learner: Learner) -> Learner:
    """The same learner, whose models compute by plain PyTorch alone."""
    learner.model.fuse(False)
    learner.ema.fuse(False)
    return learner


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] -> [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def disagreement(one: Contender, other: Contender, tolerance: float = TOLERANCE) -> float:
    """The largest relative difference of their log-likelihoods. Raises `ValueError` where they are of two functions."""
    first, second = one.score(), other.score()
    difference = float(np.max(np.abs(first - second) / np.abs(second)))
    if not difference <= tolerance:  # a NaN, too
        raise ValueError(f"the log-likelihoods differ by {difference:.1e} of them: {first} and {second} nats")
    return difference


def unlike_samples(one: Contender, other: Contender) -> float:
    """The part of the channel values of their samples that differ."""
    return float((one.sample() != other.sample()).mean())


def interleave(timers: Sequence[Callable[[], float]], seconds: float) -> np.ndarray:
    """The seconds that each timer tells, float64 [rounds, timers], in rounds of one each, until `seconds` are over.

    A round goes before, which counts in nothing; then at least `LEAST_ROUNDS`.
    """
    for timer in timers:
        timer()
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < LEAST_ROUNDS or (time.perf_counter() - begin < seconds and len(rounds) < MOST_ROUNDS):
        rounds.append([timer() for timer in timers])
    return np.array(rounds)


def interleave_calls(calls: Sequence[Callable[[], object]], seconds: float, device: torch.device) -> np.ndarray:
    """As `interleave`, of calls that are timed here."""
    return interleave([partial(timed, call, device) for call in calls], seconds)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until it has returned and the device has nothing left to do."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
