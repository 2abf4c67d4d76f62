"""A learner: a model with its moving average and optimizer, which takes steps and whose state a checkpoint holds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowpp.adam import MOMENTS, Adam
from flowpp.checkpoint import EMA, MODEL, OPTIMIZER, read_manifest, weights_file
from flowpp.conditioner import Convolution
from flowpp.config import Milestone, ModelConfig, TrainingConfig
from flowpp.lanes import side_by_side
from flowpp.model import FlowPP
from flowpp.processes import Processes
from flowpp.seeds import Stream, seed_of
from flowpp.weights import read_tensors, read_weights, write_checkpoint

MOST_SKIPPED = 5
"""Steps in a row whose gradient may not be finite; each is skipped, and leaves the weights as they are."""


class NonFiniteLoss(ArithmeticError):
    """Losses or gradients are not finite any more, step after step."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class Learner:
    """`model` and its moving average `ema`, alike in each of `processes`, after `step` optimizer steps.

    `images_seen` is also the position in the order of the data.

    The randomness of a step (dequantizer's noise, dropout) comes from generators that are seeded by (seed, step)
    and put back afterwards: a resumed run needs no generator's state, and nobody else's draws change a run.

    What `training` leaves open is the whole share at once, and nothing computed anew.

    `learning_rate_factor` is 1, and less after a run was rolled back; a checkpoint keeps it.
    """

    def __init__(self, model: ModelConfig, training: TrainingConfig, processes: Processes) -> None:
        self.training = training
        self.processes = processes
        self.device = processes.device
        with self._random(Stream.WEIGHTS):
            self.model = FlowPP(model).to(self.device).train()
        self.model.fuse(training.compile)
        self.ema = deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = _optimizer(self.model, training.weight_decay)
        self.step = 0
        self.images_seen = 0
        self.learning_rate_factor = 1.0
        self.unlogged = Sums(processes)
        self._skipped = 0
        self._parallel: nn.Module | None = None

    def initialize(self, images: Tensor) -> None:
        """Data-dependent initialization from uint8 images [B, C, H, W]; the EMA starts as a copy of its result.

        The leader does it, and the others take its weights over.
        """
        if self.processes.leader:
            with self._random(Stream.WEIGHTS):
                self.model.initialize(images.to(self.device))
        self._parallelize()
        self.ema.load_state_dict(self.model.state_dict())

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return self.learning_rate_factor * learning_rate(self.training, self.step)

    def _parallelize(self) -> None:
        if self._parallel is None:
            self.model.economize(
                bfloat16=self.training.conditioner_precision == "bfloat16",
                recompute=bool(self.training.activation_checkpointing),
            )
            self._parallel = self.processes.parallel(_TrainingLoss(self.model))

    def take_step(self, images: Tensor) -> None:
        """One step of Adam on the mean bits/dim of a batch, of which uint8 `images` [b, C, H, W] are this process's.

        They are its share of `training.batch_size`, and pass in pieces of `micro_batch_size` where that is less. The
        noise is drawn for the whole batch in each process, so that it does not depend on their number.

        A step whose gradient is not finite is skipped. Raises `NonFiniteLoss` after `MOST_SKIPPED` of them in a row.
        """
        self.step += 1
        self.images_seen += self.training.batch_size
        self.model.zero_grad()
        with self._random(Stream.STEP, self.step):
            share = self.processes.share(self.training.batch_size)
            noise = self.model.draw_noise(self.training.batch_size)[share.start : share.stop]
            if self.processes.size > 1:  # dropout differs between the processes
                torch.manual_seed(seed_of(self.training.seed, Stream.STEP, self.step, 1 + self.processes.rank))
            loss = self._accumulate(images.to(self.device, non_blocking=True), noise)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.gradient_clip)
        self.unlogged.add(loss, norm)
        if norm.isfinite():
            self._skipped = 0
            self._update()
        else:
            self._skip(loss, norm)

    def _skip(self, loss: Tensor, norm: Tensor) -> None:
        self._skipped += 1
        if self._skipped == MOST_SKIPPED:
            whole = self.processes.sum(loss.clone())
            raise NonFiniteLoss(
                self.step,
                f"{MOST_SKIPPED} steps in a row were not finite: at step {self.step} the loss was {whole:.4g} "
                f"bits/dim, its gradient's norm {norm:.4g}",
            )

    def _update(self) -> None:
        self.optimizer.step(self.learning_rate)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.ema.parameters()), list(self.model.parameters()), 1 - self.training.ema_decay
            )
            for average, buffer in zip(self.ema.buffers(), self.model.buffers(), strict=True):
                average.copy_(buffer)

    def _accumulate(self, images: Tensor, noise: Tensor) -> Tensor:
        """Gradients of the batch's mean bits/dim; this process's part of it, a scalar."""
        self._parallelize()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        length = self.training.micro_batch_size or len(images)
        for start in range(0, len(images), length):
            piece = images[start : start + length], noise[start : start + length]
            if isinstance(self._parallel, DistributedDataParallel):
                total += self._pass_together(*piece, last=start + length >= len(images))
            else:
                total += self._pass_in_lanes(*piece, start)
        return total

    def _pass_together(self, images: Tensor, noise: Tensor, *, last: bool) -> Tensor:
        """Adds the gradients of a piece in each process; after the last piece all have the sum of all."""
        parallel = self._parallel
        assert isinstance(parallel, DistributedDataParallel)
        with nullcontext() if last else parallel.no_sync():
            loss = parallel(images, noise).sum() / self.training.batch_size
            (loss * self.processes.size).backward()  # the average over the processes undoes the factor
        return loss.detach()

    def _pass_in_lanes(self, images: Tensor, noise: Tensor, start: int) -> Tensor:
        """Adds the gradients of a piece, which begins with image `start` of the batch."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        loss_of = _TrainingLoss(self.model)

        def gradients(part: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
            # a GPU's dropout is torch's own, by its generator
            seed = seed_of(self.training.seed, Stream.STEP, self.step, start + part.start, 1)
            dropout_seed = seed if self.device.type == "cpu" else None
            loss = loss_of(images[part], noise[part], dropout_seed).sum() / self.training.batch_size
            return loss.detach(), torch.autograd.grad(loss, parameters)

        parts = side_by_side(gradients, len(images), self.device)
        for _, found in parts:
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = (
                    _laid_out_as(parameter, gradient) if parameter.grad is None else parameter.grad.add_(gradient)
                )
        return torch.stack([loss for loss, _ in parts]).sum()

    def save(
        self,
        directory: Path,
        *,
        metrics: Mapping[str, float],
        unlogged: Mapping[str, float],
        dataset_sha256: str,
        validation_quantiles: Sequence[float] | None = None,
        warm_start_sha256: str | None = None,
    ) -> None:
        """Writes a checkpoint from which `load` goes on bit for bit. `unlogged` is what `self.unlogged` reads.

        Raises `OSError`, and leaves nothing then.
        """
        write_checkpoint(
            directory,
            {MODEL: self.model.state_dict(), EMA: self.ema.state_dict(), OPTIMIZER: self._moments()},
            model=self.model.config,
            training=self.training,
            step=self.step,
            images_seen=self.images_seen,
            metrics=metrics,
            validation_quantiles=validation_quantiles,
            unlogged=unlogged,
            learning_rate_factor=self.learning_rate_factor,
            dataset_sha256=dataset_sha256,
            warm_start_sha256=warm_start_sha256,
        )

    def start_from(self, directory: Path) -> None:
        """A warm start: the weights of a checkpoint and their average, and nothing else of it. Raises `BadCheckpoint`.

        The run keeps its own dtype. A checkpoint without an average begins it as a copy of its weights.
        """
        average = weights_file(read_manifest(directory))
        self.model.load_state_dict(read_weights(directory, MODEL, self.model.state_dict()))
        self.ema.load_state_dict(read_weights(directory, average, self.ema.state_dict()))

    def load(self, directory: Path) -> None:
        """Loads the state of a checkpoint of the same model, in the dtype of its files. Raises `BadCheckpoint`."""
        manifest = read_manifest(directory)
        for module, name in ((self.model, MODEL), (self.ema, EMA)):
            weights = read_weights(directory, name, module.state_dict())
            module.to(next(iter(weights.values())).dtype).load_state_dict(weights)
        found = read_tensors(directory, OPTIMIZER, self._moments())
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                moment: _laid_out_as(parameter, found[f"{moment}.{name}"].to(self.device)) for moment in MOMENTS
            }
        self.step, self.images_seen = manifest.step, manifest.images_seen
        self.learning_rate_factor = manifest.learning_rate_factor
        self.unlogged = Sums(self.processes, manifest.unlogged)

    def _moments(self) -> dict[str, Tensor]:
        """Adam's state; of a parameter that no gradient has reached yet, the zeros that it would begin with."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter) or Adam.beginning(parameter)
            moments |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
        return moments

    @contextmanager
    def _random(self, *stream: int) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(self.training.seed, *stream))
            yield


def _optimizer(model: FlowPP, weight_decay: float) -> Adam:
    """Gains, biases, embeddings and invertible matrices never decay."""
    decaying = {module.weight for module in model.modules() if isinstance(module, Convolution)}
    return Adam(
        [
            ([p for p in model.parameters() if p in decaying], weight_decay),
            ([p for p in model.parameters() if p not in decaying], 0.0),
        ]
    )


def _laid_out_as(parameter: Tensor, values: Tensor) -> Tensor:
    """Values of a parameter in its memory format: the fused optimizer reads both in the order of memory."""
    if values.shape != parameter.shape or values.stride() == parameter.stride():
        return values
    return torch.empty_like(parameter, dtype=values.dtype, device=values.device, requires_grad=False).copy_(values)


class _TrainingLoss(nn.Module):
    """`FlowPP.training_loss`, float64 [b], of images under their noise: the forward pass that the processes share."""

    def __init__(self, model: FlowPP) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, noise: Tensor, dropout_seed: int | None = None) -> Tensor:
        return self.model.training_loss(images, noise=noise, dropout_seed=dropout_seed)


class Sums:
    """Sums over the steps since the last metrics. They stay on the device until read, many at once.

    Each process adds its part of a loss; all read together. Steps that are not finite are only counted.
    """

    _MOST_PENDING = 100

    def __init__(self, processes: Processes, sums: Mapping[str, float] | None = None) -> None:
        self._processes = processes
        nothing = {"steps": 0, "bits_per_dim": 0.0, "gradient_norm": 0.0, "skipped_steps": 0}
        self._sums: dict[str, float] = {**nothing, **(sums or {})}
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Of one step, scalars on the device."""
        self._pending.append(torch.stack((loss.double(), norm.double())))
        if len(self._pending) == self._MOST_PENDING:
            self.read()

    def read(self) -> dict[str, float]:
        """The sums, after what is pending was fetched."""
        if self._pending:
            stacked = torch.stack(self._pending)
            stacked[:, 0] = self._processes.sum(stacked[:, 0].contiguous())
            for loss, norm in stacked.tolist():
                if math.isfinite(loss) and math.isfinite(norm):
                    self._sums["steps"] += 1
                    self._sums["bits_per_dim"] += loss
                    self._sums["gradient_norm"] += norm
                else:
                    self._sums["skipped_steps"] += 1
            self._pending.clear()
        return dict(self._sums)

    def means(self) -> dict[str, float]:
        """The metrics train_bits_per_dim and gradient_norm (before clipping); skipped_steps where there were any."""
        sums = self.read()
        skipped = {"skipped_steps": sums["skipped_steps"]} if sums["skipped_steps"] else {}
        if not sums["steps"]:
            return skipped
        return skipped | {
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
