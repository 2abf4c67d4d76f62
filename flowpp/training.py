"""Training: a generator of events that reads and writes a run directory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from flowpp.checkpoint import checkpoint_directories, newest_complete, read_manifest, step_of
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.data import BadImages, ImageSet, open_image_set
from flowpp.devices import is_out_of_memory
from flowpp.learner import Learner, NonFiniteLoss, Sums
from flowpp.likelihood import COLUMNS, Likelihood, check_shape, likelihood, to_symbols
from flowpp.model import FlowPP
from flowpp.processes import Processes, joined
from flowpp.run_directory import CONFIG, BadRunDirectory, RunConfig, RunDirectory, TrainingError
from flowpp.seeds import Stream, seed_of


@dataclass(frozen=True)
class Event:
    """One optimizer step was taken.

    `metrics` are those of metrics.jsonl, empty where none were due; `checkpoint` is the directory of the one that
    was written after this step, if one was; `note` says what happened before it, where that was no step.
    """

    step: int
    images_seen: int
    metrics: dict[str, float]
    checkpoint: Path | None
    note: str | None = None


ROLLBACK_FACTOR = 0.1
"""Of the learning rate, after losses that were not finite."""


def never() -> bool:
    """Is never asked to stop."""
    return False


def train(
    run_directory: Path,
    *,
    model: ModelConfig | None = None,
    training: TrainingConfig | None = None,
    images: ImageSet | Path | None = None,
    device: str | torch.device | None = None,
    resume_from: Path | None = None,
    stop: Callable[[], bool] = never,
) -> Iterator[Event]:
    """Trains a model in `run_directory`, an event a step; takes up from its newest complete checkpoint.

    Without `model`, `training` and `images` the run is the one that config.json declares; with them it is declared
    so. `resume_from` is a checkpoint of another run with the same model, to start from where this one has none.

    Who iterates decides: after each step `stop` is asked, and where it says yes, a checkpoint is written and the
    generator ends. Who merely ceases to iterate loses the steps since the last checkpoint and can resume, too.
    A resumed run goes on bit for bit (on a CPU with the same number of threads and processes) and repeats no step in
    metrics.jsonl. Under `torch.distributed.run` the processes share each batch, and the first of them writes the files.

    Raises `TrainingError`; `BadRunDirectory`, `BadCheckpoint` and `ValueError` for arguments that do not fit.
    """
    with joined(device) as processes:
        yield from _train(Path(run_directory), model, training, images, processes, resume_from, stop)


def _train(
    directory: Path,
    model: ModelConfig | None,
    training: TrainingConfig | None,
    images: ImageSet | Path | None,
    processes: Processes,
    resume_from: Path | None,
    stop: Callable[[], bool],
) -> Iterator[Event]:
    if processes.leader:  # builds the image set, which the others then find
        run, config, image_set = _prepare(directory, model, training, images, resume_from)
        checkpoint = _find_checkpoint(run, config, image_set)
        processes.told(checkpoint)
    else:
        checkpoint = processes.told(None)
        run, config, image_set = _prepare(directory, model, training, images, resume_from)
    with naming_failures(config.training, processes.device):
        learner = _learner(config, image_set, processes, checkpoint)
        note = _origin(run, checkpoint) if processes.leader else None
        try:
            yield from _steps(run, config, image_set, learner, stop, note)
        except NonFiniteLoss as error:
            if learner.learning_rate_factor < 1:
                raise
            checkpoint = processes.told(_find_checkpoint(run, config, image_set) if processes.leader else None)
            learner = _learner(config, image_set, processes, checkpoint)
            learner.learning_rate_factor = ROLLBACK_FACTOR
            rolled_back = f"{error}; rolled back to step {learner.step}, with {ROLLBACK_FACTOR} of the learning rate"
            yield from _steps(run, config, image_set, learner, stop, rolled_back)


def _learner(config: RunConfig, image_set: ImageSet, processes: Processes, checkpoint: Path | None) -> Learner:
    """As the checkpoint has it, or at the beginning."""
    learner = Learner(config.model, config.training, processes)
    if checkpoint:
        learner.load(checkpoint)
    else:
        first = Batches(image_set.training, config.training, processes).first()
        learner.initialize(to_symbols(first, learner.model))
    return learner


def _steps(
    run: RunDirectory,
    config: RunConfig,
    image_set: ImageSet,
    learner: Learner,
    stop: Callable[[], bool],
    note: str | None,
) -> Iterator[Event]:
    """The steps that are left. `note` goes with the first event."""
    recipe, processes = config.training, learner.processes
    batches = Batches(image_set.training, recipe, processes)
    validation = _spread(image_set.validation, recipe.evaluation_images)
    if processes.leader:
        run.sweep(learner.step)
        run.truncate_metrics(learner.step)

    stopping = processes.any(stop())
    seconds, timed_images = 0.0, 0
    while learner.step < recipe.steps and not stopping:
        start = time.perf_counter()
        learner.take_step(to_symbols(batches.after(learner.images_seen), learner.model))
        step, images_seen = learner.step, learner.images_seen
        timed_images += recipe.batch_size
        stopping = processes.any(stop())

        last = step == recipe.steps
        evaluating = len(validation) > 0 and (last or step % recipe.evaluation_every == 0)
        saving = last or step % recipe.checkpoint_every == 0
        metrics: dict[str, float] = {}
        if evaluating or saving or step % recipe.log_every == 0:
            metrics = {"learning_rate": learner.learning_rate, **learner.unlogged.means()}
            learner.unlogged = Sums(processes)
        seconds += time.perf_counter() - start
        if metrics:
            metrics["images_per_second"] = timed_images / seconds
            seconds, timed_images = 0.0, 0
        if evaluating:
            metrics |= _evaluate(learner.ema, validation, recipe.seed, step, processes)
        if metrics and processes.leader:
            run.append_metrics(step, images_seen, metrics)

        written = None
        if saving or stopping:
            known = metrics or learner.unlogged.means()
            if processes.leader:
                written = run.checkpoint(step)
                run.sync_metrics()
            learner.save(run.checkpoint(step), metrics=known, dataset_sha256=image_set.sha256)
            if processes.leader:
                run.prune(recipe.keep_checkpoints)
        yield Event(step, images_seen, metrics, written, note)
        note = None


class Batches:
    """The training images in the order of the run: a permutation an epoch, one after the other, cut into batches.

    Of a batch, a process reads its share.
    """

    def __init__(self, images: np.ndarray, recipe: TrainingConfig, processes: Processes) -> None:
        self.images = images
        self.recipe = recipe
        self._share = processes.share(recipe.batch_size)
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def first(self) -> np.ndarray:
        """The images of the data-dependent initialization: those that the run begins with."""
        return self._taken(range(min(self.recipe.init_batch_size, len(self.images))))

    def after(self, images_seen: int) -> np.ndarray:
        """This process's share of the next batch, uint8 [b, H, W, C]."""
        return self._taken(range(images_seen + self._share.start, images_seen + self._share.stop))

    def _taken(self, positions: range) -> np.ndarray:
        n = len(self.images)
        return self.images[[self._permutation(position // n)[position % n] for position in positions]]

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(seed_of(self.recipe.seed, Stream.ORDER, epoch)).permutation(len(self.images))


def _prepare(
    directory: Path,
    model: ModelConfig | None,
    training: TrainingConfig | None,
    images: ImageSet | Path | None,
    resume_from: Path | None,
) -> tuple[RunDirectory, RunConfig, ImageSet]:
    run = RunDirectory(directory)
    if model is not None and training is not None and images is not None:
        source = images.directory if isinstance(images, ImageSet) else Path(images)
        origin = None if resume_from is None else str(Path(resume_from).resolve())
        run.write_config(RunConfig(model=model, training=training, data=str(source.resolve()), resume_from=origin))
    elif any(argument is not None for argument in (model, training, images, resume_from)):
        raise ValueError("model, training and images belong together: give all three, or none to go on with a run")
    config = run.config
    try:
        image_set = images if isinstance(images, ImageSet) else open_image_set(Path(config.data), run.images)
        check_shape(image_set.shape, config.model)
    except BadImages as error:
        raise TrainingError("bad_dataset", str(error)) from error
    if not len(image_set.training):
        raise TrainingError("bad_dataset", f"{config.data} holds no training images: all are for validation")
    return run, config, image_set


def _find_checkpoint(run: RunDirectory, config: RunConfig, image_set: ImageSet) -> Path | None:
    """What to take up from: the run's newest complete checkpoint, else the one of `resume_from`."""
    own = newest_complete(run.path)
    checkpoint = own or (Path(config.resume_from) if config.resume_from else None)
    if checkpoint is None:
        return None
    manifest = read_manifest(checkpoint)
    if manifest.model != config.model:
        raise BadRunDirectory(f"{checkpoint} is of another model than the one that {run.path / CONFIG} declares")
    if own and manifest.dataset_sha256 != image_set.sha256:
        raise TrainingError("bad_dataset", f"{config.data} holds other images than those the run began with")
    if not own and manifest.step >= config.training.steps:
        raise BadRunDirectory(f"{checkpoint} is of step {manifest.step}; this run ends at step {config.training.steps}")
    return checkpoint


def _origin(run: RunDirectory, checkpoint: Path | None) -> str | None:
    """What the run takes up, in words; damaged checkpoints that it passes over are named."""
    found = None if checkpoint is None else f"goes on from {checkpoint.name}"
    own = checkpoint is not None and checkpoint.parent == run.checkpoint(0).parent
    step = step_of(checkpoint) if own and checkpoint is not None else 0
    damaged = [path.name for path in checkpoint_directories(run.path) if step_of(path) > step]
    if damaged:
        return f"damaged, and passed over: {', '.join(damaged)}; {found or 'begins anew'}"
    return found


def _spread(images: np.ndarray, most: int) -> np.ndarray:
    """At most `most` images, evenly spaced: neighbours in a set are often alike."""
    n = min(most, len(images))
    return images[np.arange(n) * len(images) // max(n, 1)]


def _evaluate(model: FlowPP, images: np.ndarray, seed: int, step: int, processes: Processes) -> dict[str, float]:
    """Validation metrics under noise that is the same each time; each process scores its share of the images."""
    share = processes.share(len(images))
    estimates = np.zeros((len(images), len(COLUMNS)))
    if share:
        own = likelihood(
            model, images[share.start : share.stop], seed=seed_of(seed, Stream.VALIDATION), first=share.start
        )
        estimates[share.start : share.stop] = np.concatenate(list(own))
    estimates = processes.sum(torch.from_numpy(estimates).to(processes.device)).cpu().numpy()
    scored = Likelihood(estimates, model.config.dimensions, importance_samples=1, seed=seed)
    metrics = {"validation_bits_per_dim": scored.mean}
    if scored.standard_error is not None:
        metrics["validation_standard_error"] = scored.standard_error
    if not np.isfinite(list(metrics.values())).all():
        raise NonFiniteLoss(step, f"at step {step} the validation images had {scored.mean:.4g} bits/dim")
    return metrics


@contextmanager
def naming_failures(recipe: TrainingConfig, device: torch.device) -> Iterator[None]:
    """Turns what a run can fail of into `TrainingError`."""
    try:
        yield
    except NonFiniteLoss as error:
        raise TrainingError("nan_loss", str(error), error.step) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sizes = f"batch_size {recipe.batch_size} and init_batch_size {recipe.init_batch_size}"
        raise TrainingError("out_of_memory", f"out of memory on {device} with {sizes}; try smaller ones") from error
