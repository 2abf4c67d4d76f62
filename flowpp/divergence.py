"""Divergence: the bits/dim of a run stays above the cost of a code without any model. Needs no torch.

A uniform code spends `bits` bits on each channel value. The rule reads nothing but the rows of metrics.jsonl, in their
order, so that a resumed run, each of several processes and the service come to the same decision.
"""

import math
from collections.abc import Mapping

from flowpp.config import TrainingConfig

TRAINING, VALIDATION = "train_bits_per_dim", "validation_bits_per_dim"

DIVERGED = "diverged_steps"
"""The metric of a run that has diverged and not recovered: for how many steps. Its checkpoints have it, too."""

SPAN = 10
"""Steps above a bound that count as staying there: a single batch may hold rare images."""

RISE = 1.0
"""Bits/dim. A run this far above its best has lost its progress. A slow start stays near its beginning."""

HOPELESS = 8.0
"""Bits/dim above the uniform code that no untrained model costs after its data-dependent initialization."""

LOST_AT_ONCE = 100.0
"""Bits/dim above the uniform code that fail a run of fewer than `SPAN` steps after its warm-up.

Below that, such a run may still be near an initialization from few images, as a trial run of two steps is.
"""

PATIENCE = 1_000
"""Steps, or those of a longer warm-up, that a diverged run has to recover."""


class Divergence:
    """Follows the metrics of a run of a model with `bits` bits a channel value, trained by `recipe`."""

    def __init__(self, bits: int, recipe: TrainingConfig) -> None:
        self.failure: str | None = None
        self._uniform = bits
        self._recipe = recipe
        self._step = 0
        self._best = {TRAINING: math.inf, VALIDATION: math.inf}
        self._above = {TRAINING: _Span(), VALIDATION: _Span()}
        self._lost = _Span()
        self._since: int | None = None
        self._ever: int | None = None  # the same, until an evaluation has shown that the average has recovered

    @property
    def since(self) -> int | None:
        """Returns the step after which the run has diverged, or None if it has not, or has recovered."""
        return self._since

    @property
    def suspected_since(self) -> int | None:
        """Returns the step after which the run may turn out to have diverged, or None if nothing points to it."""
        return self._lost.began if self._since is None else self._since

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the metric `DIVERGED` if the run has diverged and not recovered, else nothing."""
        return {} if self._since is None else {DIVERGED: float(self._step - self._since)}

    def take(self, row: Mapping[str, float]) -> str | None:
        """Follows the row of a step; returns a warning if bits/dim begins to stay above the uniform code or ends to.

        Sets `failure`, a sentence, if the run has diverged and is not to go on.
        """
        previous, self._step = self._step, int(row["step"])
        training, validation = row.get(TRAINING), row.get(VALIDATION)
        notes = []
        if training is not None:
            self._lost.take(previous, self._warm and training > self._bound)
            notes.append(self._note(TRAINING, training, previous))
        if validation is not None:
            notes.append(self._note(VALIDATION, validation, self._step - 1))
        self._decide(training, validation)
        if training is not None:
            self._best[TRAINING] = min(self._best[TRAINING], training)
        if validation is not None and self._since is None:
            self._best[VALIDATION] = min(self._best[VALIDATION], validation)
        return "; ".join(filter(None, notes)) or None

    @property
    def _warm(self) -> bool:
        return self._step > self._recipe.warmup_steps

    @property
    def _last(self) -> bool:
        return self._step >= self._recipe.steps

    @property
    def _bound(self) -> float:
        """Training bits/dim above this bound show a run that has lost its progress, or never made any."""
        return max(self._uniform, min(self._best[TRAINING] + RISE, self._uniform + HOPELESS))

    def _stays(self, span: "_Span", far: bool) -> bool:
        """Returns True if a span has lasted, or if it is `far` above and covers a short run after its warm-up."""
        if span.began is None:
            return False
        return self._step - span.began >= SPAN or (far and self._last and span.began <= self._recipe.warmup_steps)

    def _note(self, name: str, value: float, previous: int) -> str | None:
        span, what = self._above[name], name.partition("_")[0].replace("train", "training")
        span.take(previous, self._warm and value > self._uniform)
        if span.began is None:
            noted, span.noted = span.noted, False
            here = f"{what} bits/dim is {_shown(value)} at step {self._step:,}"
            return f"{here}, below the {self._uniform} of a uniform code again" if noted else None
        if span.noted or not self._stays(span, far=name == TRAINING and value > self._bound):
            return None
        span.noted = True
        return (
            f"{what} bits/dim stays above {self._uniform}, which a uniform code costs, since step "
            f"{span.began + 1:,}: it is {_shown(value)} at step {self._step:,}"
        )

    def _decide(self, training: float | None, validation: float | None) -> None:
        if self._stays(self._lost, far=training is not None and training > self._uniform + LOST_AT_ONCE):
            self._since = self._ever = self._lost.began if self._since is None else self._since
        if validation is not None:  # of the average weights, which are what the run is for: it decides
            self._evaluate(validation)
        elif self._lost.began is None and not self._validated:
            self._since = None
        self.failure = self._in_words(training, validation) if self._since is not None and self._given_up else None

    def _evaluate(self, validation: float) -> None:
        best = min(self._best[VALIDATION] + RISE, self._uniform + HOPELESS) if self._validated else 0
        if validation <= max(self._uniform, best):
            self._since = self._ever = None
            if self._lost.began is not None:
                self._lost.began = self._step
        else:
            self._since = self._ever

    @property
    def _given_up(self) -> bool:
        assert self._since is not None
        patience = max(PATIENCE, self._recipe.warmup_steps)
        return self._last or (self._lost.began is not None and self._step - self._since >= patience)

    def _in_words(self, training: float | None, validation: float | None) -> str:
        assert self._since is not None
        numbers = {"training": training, "validation": validation}
        found = " and ".join(f"{what} {_shown(value)}" for what, value in numbers.items() if value is not None)
        return (
            f"the training has diverged since step {self._since + 1:,} and has not recovered: {found} bits/dim "
            f"at step {self._step:,}, and a uniform code costs {self._uniform}"
        )

    @property
    def _validated(self) -> bool:
        return self._best[VALIDATION] < math.inf


def _shown(bits_per_dim: float) -> str:
    return f"{bits_per_dim:,.3f}" if bits_per_dim < 1e6 else f"{bits_per_dim:.3g}"


class _Span:
    """Consecutive rows above a bound: the step after which they `began`, or None; whether a warning `noted` it."""

    def __init__(self) -> None:
        self.began: int | None = None
        self.noted = False

    def take(self, previous: int, above: bool) -> None:
        if not above:
            self.began = None
        elif self.began is None:
            self.began = previous
