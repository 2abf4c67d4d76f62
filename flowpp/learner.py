"""A learner: a model with its moving average and optimizer, which takes steps and whose state a checkpoint holds."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from flowpp.checkpoint import EMA, MODEL, OPTIMIZER, read_manifest
from flowpp.config import Milestone, ModelConfig, TrainingConfig
from flowpp.model import FlowPP
from flowpp.seeds import Stream, seed_of
from flowpp.weights import read_tensors, write_checkpoint

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's state of a parameter


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient of a step is not finite; the weights are lost from that step on."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Learner:
    """`model` and its moving average `ema`, on a device, after `step` optimizer steps.

    `images_seen` is also the position in the order of the data.

    The randomness of a step (dequantizer's noise, dropout) comes from generators that are seeded by (seed, step)
    and put back afterwards: a resumed run needs no generator's state, and nobody else's draws change a run.
    """

    def __init__(self, model: ModelConfig, training: TrainingConfig, device: torch.device) -> None:
        self.training = training
        self.device = device
        with self._random(Stream.WEIGHTS):
            self.model = FlowPP(model).to(device).train()
        self.ema = deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0)
        self.step = 0
        self.images_seen = 0
        self.unlogged = Sums()

    def initialize(self, images: Tensor) -> None:
        """Data-dependent initialization from uint8 images [B, C, H, W]; the EMA starts as a copy of its result."""
        with self._random(Stream.WEIGHTS):
            self.model.initialize(images.to(self.device))
        self.ema.load_state_dict(self.model.state_dict())

    def take_step(self, images: Tensor) -> None:
        """One step of Adam on the mean bits/dim of uint8 images [B, C, H, W]."""
        self.step += 1
        self.images_seen += len(images)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, self.step)
        with self._random(Stream.STEP, self.step):
            loss = self.model.bits_per_dim(images.to(self.device, non_blocking=True)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.gradient_clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.model.parameters()), 1 - self.training.ema_decay
            )
            for average, buffer in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                average.copy_(buffer)
        self.unlogged.add(self.step, loss.detach(), norm)

    def save(self, directory: Path, *, metrics: Mapping[str, float], dataset_sha256: str) -> None:
        """Writes a checkpoint from which `load` goes on bit for bit. Raises `NonFiniteLoss` rather than save NaN."""
        write_checkpoint(
            directory,
            {MODEL: self.model.state_dict(), EMA: self.ema.state_dict(), OPTIMIZER: self._moments()},
            model=self.model.config,
            training=self.training,
            step=self.step,
            images_seen=self.images_seen,
            metrics=metrics,
            unlogged=self.unlogged.read(),
            dataset_sha256=dataset_sha256,
        )

    def load(self, directory: Path) -> None:
        """Takes up the state of a checkpoint of the same model. Raises `BadCheckpoint`."""
        manifest = read_manifest(directory)
        self.model.load_state_dict(read_tensors(directory, MODEL, self.model.state_dict()))
        self.ema.load_state_dict(read_tensors(directory, EMA, self.ema.state_dict()))
        found = read_tensors(directory, OPTIMIZER, self._moments())
        state = {
            index: {moment: found[f"{moment}.{name}"] for moment in _MOMENTS}
            for index, (name, _) in enumerate(self.model.named_parameters())
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step, self.images_seen = manifest.step, manifest.images_seen
        self.unlogged = Sums(manifest.unlogged)

    def _moments(self) -> dict[str, Tensor]:
        """Adam's state; of a parameter that no gradient has reached yet, the zeros that it would begin with."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            zeros = {moment: torch.zeros_like(parameter) for moment in _MOMENTS} | {"step": torch.zeros(())}
            state = self.optimizer.state.get(parameter) or zeros
            moments |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
        return moments

    @contextmanager
    def _random(self, *stream: int) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(self.training.seed, *stream))
            yield


class Sums:
    """Sums over the steps since the last metrics. They stay on the device until read, many at once."""

    _MOST_PENDING = 100

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        self._sums: dict[str, float] = {"steps": 0, "bits_per_dim": 0.0, "gradient_norm": 0.0, **(sums or {})}
        self._pending: list[tuple[int, Tensor]] = []

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Of one step, scalars on the device."""
        self._pending.append((step, torch.stack((loss.double(), norm.double()))))
        if len(self._pending) == self._MOST_PENDING:
            self.read()

    def read(self) -> dict[str, float]:
        """The sums, after what is pending was fetched. Raises `NonFiniteLoss` for the first step that is not finite."""
        if self._pending:
            values = torch.stack([value for _, value in self._pending]).tolist()
            for (step, _), (loss, norm) in zip(self._pending, values, strict=True):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise NonFiniteLoss(
                        step, f"at step {step} the loss was {loss:.4g} bits/dim, its gradient's norm {norm:.4g}"
                    )
                self._sums["steps"] += 1
                self._sums["bits_per_dim"] += loss
                self._sums["gradient_norm"] += norm
            self._pending.clear()
        return dict(self._sums)

    def means(self) -> dict[str, float]:
        """The metrics train_bits_per_dim and gradient_norm (before clipping); none without steps."""
        sums = self.read()
        if not sums["steps"]:
            return {}
        return {
            "train_bits_per_dim": sums["bits_per_dim"] / sums["steps"],
            "gradient_norm": sums["gradient_norm"] / sums["steps"],
        }


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Of optimizer step 1, 2, ...: warm-up from zero, milestones, and at the end a linear cool-down to zero."""
    warm = min(1.0, step / max(1, training.warmup_steps))
    cool = min(1.0, (training.steps - step + 1) / (training.cooldown_steps + 1))
    return training.learning_rate * warm * _milestone_factor(training, step) * cool


def _milestone_factor(training: TrainingConfig, step: int) -> float:
    points = [Milestone(step=training.warmup_steps, factor=1), *training.milestones]
    if step < points[0].step:
        return 1
    following = next((index for index, point in enumerate(points) if point.step > step), None)
    if following is None:
        return points[-1].factor
    before, after = points[following - 1], points[following]
    part = (step - before.step) / (after.step - before.step)
    if before.factor and after.factor:
        return math.exp((1 - part) * math.log(before.factor) + part * math.log(after.factor))
    return (1 - part) * before.factor + part * after.factor
