"""A run's plan: how many images pass at once, and whether couplings are computed anew, so that it fits its memory.

What a recipe states is kept, and what it leaves open is chosen. Needs no torch.
"""

from flowpp.config import ModelConfig, TrainingConfig
from flowpp.memory import advice, allowed, estimate, gib, micro_batch, most_images

SURE = 0.88
"""Of the memory, for what is chosen: the estimate is up to an eighth below the peak (benchmarks/RESULTS.md)."""

OPEN = ("micro_batch_size", "activation_checkpointing")
"""What of a recipe is chosen where it is not given."""


class DoesNotFit(ValueError):
    """No plan fits into the memory; the message says what to choose."""


def is_open(training: TrainingConfig) -> bool:
    """Whether a recipe leaves something to choose."""
    return any(getattr(training, name) is None for name in OPEN)


def choose(model: ModelConfig, training: TrainingConfig, available: float, *, cuda: bool = False) -> TrainingConfig:
    """`training` with a choice of what it leaves open, for a process that has `available` bytes.

    The first of these that fits: the whole share of the batch at once; fewer images, in several passes; the same two
    with couplings computed anew. That order is by time (docs/performance.md): where one image fits without that, more
    images with it are no faster. `micro_batch_size` stays open where the whole share passes at once. Raises
    `DoesNotFit`.
    """
    room = allowed(training, available)
    ways = [False, True] if training.activation_checkpointing is None else [training.activation_checkpointing]
    for bound in (SURE * room, room):
        for recompute in ways:
            candidate = training.model_copy(update={"activation_checkpointing": recompute})
            if found := _in_passes(model, candidate, bound, cuda):
                return found
    raise DoesNotFit(advice(model, training, available, cuda=cuda))


def fits(model: ModelConfig, training: TrainingConfig, room: float, *, cuda: bool = False) -> bool:
    """Whether a recipe, of which nothing is open any more, fits into so many bytes."""
    return estimate(model, training, cuda=cuda).at(micro_batch(training)) <= room


def _in_passes(model: ModelConfig, training: TrainingConfig, room: float, cuda: bool) -> TrainingConfig | None:
    """With as few passes as fit into so many bytes, all of about as many images; none where nothing fits."""
    if fits(model, training, room, cuda=cuda):
        return training
    most = most_images(model, training, room, cuda=cuda)
    if training.micro_batch_size or not most:
        return None
    share = micro_batch(training)
    passes = max(2, -(-share // most))
    return training.model_copy(update={"micro_batch_size": -(-share // passes)})


def taken_over(training: TrainingConfig, earlier: TrainingConfig) -> TrainingConfig:
    """`training` with what it leaves open as the run had it `earlier`, when nothing was open any more."""
    return training.model_copy(
        update={name: getattr(earlier, name) for name in OPEN if getattr(training, name) is None}
    )


def taken_up(
    model: ModelConfig,
    training: TrainingConfig,
    earlier: TrainingConfig | None,
    available: float,
    *,
    cuda: bool = False,
) -> TrainingConfig:
    """`choose`, or the plan that the run has had `earlier`, where that still fits. Raises `DoesNotFit`."""
    kept = taken_over(training, earlier) if earlier else None
    if kept and fits(model, kept, allowed(training, available), cuda=cuda):
        return kept
    return choose(model, training, available, cuda=cuda)


def describe(model: ModelConfig, training: TrainingConfig, available: float, *, cuda: bool = False) -> str:
    """A plan in one line."""
    images = micro_batch(training)
    recomputed = ", couplings computed anew" if training.activation_checkpointing else ""
    needed, room = estimate(model, training, cuda=cuda).at(images), allowed(training, available)
    return f"{images:,} images a forward pass{recomputed}: {gib(needed)} of {gib(room)}"
