"""Training: a generator of events that reads and writes a run directory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch

from flowpp.batches import Batches
from flowpp.checkpoint import MODEL, checkpoint_directories, newest_complete, read_manifest, step_of
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.data import BadImages, ImageSet, open_image_set
from flowpp.devices import is_out_of_memory, memory_of
from flowpp.divergence import Divergence
from flowpp.evaluation import Looked, draw_samples, evaluate, spread
from flowpp.initialization import TooFewImages
from flowpp.learner import Learner, NonFiniteLoss, Sums
from flowpp.ledger import Ledger
from flowpp.likelihood import check_shape, to_symbols
from flowpp.memory import advice
from flowpp.native import kernels
from flowpp.plan import OPEN, DoesNotFit, describe, is_open, taken_over, taken_up
from flowpp.processes import Processes, joined
from flowpp.run_directory import CONFIG, BadRunDirectory, RunConfig, RunDirectory, TrainingError
from flowpp.tracing import span


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
    so. `resume_from` is a warm start: a checkpoint, of a model alike but for its dropout, whose weights and average the
    run begins with. Steps, schedule, order and optimizer begin anew, whatever the recipe.

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
    config, planned = _planned(config, checkpoint, processes)
    with naming_failures(config, processes.device):
        learner = _learner(config, image_set, processes, checkpoint)
        note = "; ".join(filter(None, (_origin(run, config, checkpoint), planned))) if processes.leader else None
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


def _planned(config: RunConfig, checkpoint: Path | None, processes: Processes) -> tuple[RunConfig, str | None]:
    """The configuration with what it leaves open as the run's checkpoint has it, or chosen where that does not fit.

    And what that is, in words, where it is not the whole share at once. The same in each process.
    """
    if not is_open(config.training):
        return config, None
    model, cuda = config.model, processes.device.type == "cuda"
    available = processes.least_memory()
    compiled = config.training.compile and not processes.any(_lacks_kernels(processes.device))
    together = config.training.model_copy(update={"num_processes": processes.size, "compile": compiled})
    earlier = read_manifest(checkpoint).training if checkpoint else None
    try:
        chosen = taken_up(model, together, earlier, available, cuda=cuda)
    except DoesNotFit as error:
        raise TrainingError("out_of_memory", str(error)) from error
    said = (
        describe(model, chosen, available, cuda=cuda)
        if (chosen.micro_batch_size or chosen.activation_checkpointing)
        else None
    )
    kept = taken_over(together, earlier) if earlier else chosen
    if chosen != kept:
        was = describe(model, kept, available, cuda=cuda)
        said = f"does not fit any more, {was}; from here on, {describe(model, chosen, available, cuda=cuda)}"
    plan = {name: getattr(chosen, name) for name in OPEN}
    return config.model_copy(update={"training": config.training.model_copy(update=plan)}), said


def _lacks_kernels(device: torch.device) -> bool:
    """Returns True if models compute by plain PyTorch here. It keeps more for the backward pass than CPU kernels."""
    return device.type == "cpu" and kernels(torch.float32) is None


def _learner(config: RunConfig, image_set: ImageSet, processes: Processes, checkpoint: Path | None) -> Learner:
    """As the run's checkpoint has it, or at the beginning."""
    learner = Learner(config.model, config.training, processes)
    if checkpoint:
        learner.load(checkpoint)
    elif config.resume_from:
        learner.start_from(Path(config.resume_from))
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
    validation = spread(image_set.validation, recipe.evaluation_images)
    ledger = Ledger(run, learner, image_set.sha256, _weights_sha256(config.resume_from))
    ledger.note(note)
    unfinished = processes.any(processes.leader and _take_up(run, recipe, learner.step))
    divergence = Divergence(config.model.bits, recipe)
    for row in run.read_metrics():  # which the leader has cut off after the learner's step
        divergence.take(row)
    _end_if_diverged(divergence, learner)
    ledger.begin()
    stopping = processes.any(stop())
    timer = Timer()
    while not stopping and (unfinished or learner.step < recipe.steps):
        if not unfinished:
            with timer, _naming_divergence(divergence, learner):
                learner.take_step(to_symbols(batches.after(learner.images_seen), learner.model))
                stopping = processes.any(stop())
            timer.images += recipe.batch_size
        due = Due.at(learner.step, recipe)
        metrics: dict[str, float] = {}
        quantiles = None
        if due.metrics:
            looked = _look(ledger, learner, validation if due.evaluation else None, due.samples, stop)
            if looked is None:  # the next run of this directory will
                stopping = True
            else:
                metrics = {"learning_rate": learner.learning_rate, **learner.unlogged.means(), **timer.read()}
                metrics |= recipe.beyond_the_paper | looked.metrics
                ledger.note(divergence.take({"step": learner.step, **metrics}))
                metrics |= divergence.metrics
                if processes.leader and divergence.since is not None:
                    run.mark_diverged(divergence.since)
                quantiles = looked.validation_quantiles
                learner.unlogged = Sums(processes)
                ledger.metrics(metrics)
        written = None
        if unfinished and metrics:
            ledger.complete_checkpoint(metrics, quantiles)
        elif not unfinished and (due.checkpoint or stopping or ledger.due()):
            last = stopping or learner.step == recipe.steps
            with span("checkpoint", attributes={"flowpp.step": learner.step}):
                held = metrics or learner.unlogged.means() | divergence.metrics
                since = divergence.suspected_since
                written = ledger.checkpoint(held, quantiles, last=last, suspected_since=since)
        yield Event(learner.step, learner.images_seen, metrics, written, ledger.notes())
        _end_if_diverged(divergence, learner)
        unfinished = False


def _end_if_diverged(divergence: Divergence, learner: Learner) -> None:
    """Raises `TrainingError`, in each process, if the run has diverged and is not to go on."""
    failure = divergence.failure
    if learner.processes.any(failure is not None):
        raise TrainingError("diverged", failure or "the training has diverged", learner.step)


@contextmanager
def _naming_divergence(divergence: Divergence, learner: Learner) -> Iterator[None]:
    """Turns losses that are not finite, after a rollback, into `TrainingError` if the run had diverged before."""
    try:
        yield
    except NonFiniteLoss as error:
        if divergence.since is None or learner.learning_rate_factor == 1:
            raise
        why = f"the training has diverged since step {divergence.since + 1:,}, and then {error}"
        raise TrainingError("diverged", why, error.step) from error


def _look(
    ledger: Ledger, learner: Learner, validation: np.ndarray | None, samples: bool, stop: Callable[[], bool]
) -> Looked | None:
    """Evaluates and draws samples where that is due; none where it was stopped."""
    looked: Looked | None = Looked({})
    if validation is not None and len(validation):
        with span("evaluation", attributes={"flowpp.step": learner.step, "flowpp.images": len(validation)}):
            looked = evaluate(learner, validation, stop)
    if looked is not None and samples:
        with span("samples", attributes={"flowpp.step": learner.step}):
            drawn = draw_samples(learner, stop)
            if drawn is None:
                return None
            if len(drawn) or not learner.processes.leader:
                ledger.samples(drawn)
            else:
                ledger.note(f"no samples at step {learner.step}: the model decodes to numbers that are not finite")
    return looked


def _take_up(run: RunDirectory, recipe: TrainingConfig, step: int) -> bool:
    """Removes what is beyond the step; whether the step's metrics are still to come, for it was stopped before."""
    run.sweep(step)
    run.truncate_metrics(step)
    rows = run.read_metrics()
    return step > 0 and Due.at(step, recipe).metrics and not (rows and rows[-1]["step"] == step)


@dataclass(frozen=True)
class Due:
    """What a recipe wants after a step."""

    metrics: bool
    evaluation: bool
    samples: bool
    checkpoint: bool

    @classmethod
    def at(cls, step: int, recipe: TrainingConfig) -> Self:
        last = step == recipe.steps
        evaluation = last or step % recipe.evaluation_every == 0
        samples = last or step % recipe.sample_every == 0
        checkpoint = last or step % recipe.checkpoint_every == 0
        metrics = evaluation or samples or checkpoint or step % recipe.log_every == 0
        return cls(metrics, evaluation, samples, checkpoint)


class Timer:
    """Seconds within its blocks, and the `images` that passed there."""

    def __init__(self) -> None:
        self.images = 0
        self._seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._start

    def read(self) -> dict[str, float]:
        """The metric images_per_second since it was read before."""
        rate = {"images_per_second": self.images / self._seconds} if self._seconds else {}
        self.images, self._seconds = 0, 0.0
        return rate


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
        image_set = images if isinstance(images, ImageSet) else _open(config, run)
        check_shape(image_set.shape, config.model)
    except BadImages as error:
        raise TrainingError("bad_dataset", str(error)) from error
    if not len(image_set.training):
        raise TrainingError("bad_dataset", f"{config.data} holds no training images: by their names all are held out")
    return run, config, image_set


def _open(config: RunConfig, run: RunDirectory) -> ImageSet:
    return open_image_set(Path(config.data), run.images, test_as_validation=config.test_as_validation)


def _find_checkpoint(run: RunDirectory, config: RunConfig, image_set: ImageSet) -> Path | None:
    """Returns the run's newest complete checkpoint. If there is none, checks that the run can start.

    A new model needs enough images for its initialization; a warm start does not.
    """
    own = newest_complete(run.path)
    if own:
        manifest = read_manifest(own)
        if manifest.model != config.model:
            raise BadRunDirectory(f"{own} is of another model than the one that {run.path / CONFIG} declares")
        if manifest.dataset_sha256 != image_set.sha256:
            raise TrainingError("bad_dataset", f"{config.data} holds other images than those the run began with")
    elif config.resume_from:
        found = read_manifest(Path(config.resume_from)).model
        if fault := config.model.unlike(found):
            raise BadRunDirectory(f"{config.resume_from} cannot start this run: {fault}")
    elif fault := config.training.too_few(len(image_set.training)):
        raise TrainingError("bad_dataset", f"{config.data}: {fault}")
    return own


def _weights_sha256(checkpoint: str | None) -> str | None:
    """Of the weights that a warm start begins with."""
    return None if checkpoint is None else read_manifest(Path(checkpoint)).files[MODEL].sha256


def _origin(run: RunDirectory, config: RunConfig, checkpoint: Path | None) -> str:
    """Where the run begins, in words; damaged checkpoints that it passes over are named."""
    step = step_of(checkpoint) if checkpoint else 0
    if checkpoint:
        found = f"goes on from {checkpoint.name}"
    elif config.resume_from:
        origin = read_manifest(Path(config.resume_from))
        found = f"warm start from the weights of {config.resume_from}, of step {origin.step:,}"
    else:
        found = "starts at the first step, with new weights"
    damaged = [path.name for path in checkpoint_directories(run.path) if step_of(path) > step]
    return f"damaged, and passed over: {', '.join(damaged)}; {found}" if damaged else found


@contextmanager
def naming_failures(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Turns what a run can fail of into `TrainingError`."""
    try:
        yield
    except NonFiniteLoss as error:
        raise TrainingError("nan_loss", str(error), error.step) from error
    except TooFewImages as error:
        raise TrainingError("bad_dataset", str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        recipe = config.training.model_copy(update={"compile": config.training.compile and not _lacks_kernels(device)})
        advised = advice(config.model, recipe, memory_of(device), cuda=device.type == "cuda")
        raise TrainingError("out_of_memory", f"out of memory on {device}: {advised}") from error
