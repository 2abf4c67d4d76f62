"""The pace of an attempt: when it will be done, by the time that its own steps have taken."""

import time
from collections.abc import Callable

from worker.jobs import Progress


class Pace:
    """Measured from the first step that it is told of, on a clock of Unix seconds."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.time) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def at(self, step: int) -> Progress:
        """The progress now, with an estimate of its end from the second step told on."""
        now = self._clock()
        progress = Progress.at(step, self._total_steps)
        if self._first is None:
            self._first = step, now
        first, began = self._first
        if step <= first or now <= began:
            return progress
        left = (now - began) / (step - first) * (self._total_steps - step)
        return progress.model_copy(update={"estimated_finish_at": round(now + left, 3)})
