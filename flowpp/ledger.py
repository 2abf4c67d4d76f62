"""What a run writes while it trains. A disk that takes nothing for a while delays it, and nothing is lost."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowpp.checkpoint import complete_checkpoint
from flowpp.data import encode_png
from flowpp.durable import replace_file
from flowpp.images import image_grid
from flowpp.learner import Learner
from flowpp.run_directory import TENSORBOARD, RunDirectory, TrainingError
from flowpp.tensorboard import EventFile

PATIENCE_SECONDS = 300
"""How long the last checkpoint of a run waits for the disk."""

_PAUSE_SECONDS = 1


class Ledger:
    """Metrics and checkpoints of a run; each process calls the same methods, and the leader writes.

    `owing` while a checkpoint could not be written: the run goes on, and `due` says when to try again.
    """

    def __init__(
        self, run: RunDirectory, learner: Learner, dataset_sha256: str, warm_start_sha256: str | None = None
    ) -> None:
        self.owing = False
        self._run = run
        self._learner = learner
        self._leader = learner.processes.leader
        self._dataset_sha256 = dataset_sha256
        self._warm_start_sha256 = warm_start_sha256
        self._events = EventFile(run)
        self._rows: list[dict[str, Any]] = []
        self._unshown: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._again_at = 0.0
        self._late_since: float | None = None

    def begin(self) -> None:
        """Makes the event file of what the run has written before."""
        if self._leader:
            self._tried(TENSORBOARD, self._events.write)

    def note(self, sentence: str | None) -> None:
        """To be told with the next event."""
        if sentence:
            self._notes.append(sentence)

    def notes(self) -> str | None:
        """What is to be told, and is then forgotten."""
        told = "; ".join(self._notes) or None
        self._notes.clear()
        return told

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Appends a line of the learner's step to metrics.jsonl, or keeps it until the disk takes it."""
        if self._leader:
            step, images_seen = self._learner.step, self._learner.images_seen
            self._rows.append({"step": step, "images_seen": images_seen, "time": time.time(), **metrics})
            self._tried("metrics", self._append)
            self._show()

    def samples(self, images: np.ndarray) -> None:
        """Writes a grid of samples, uint8 [n, H, W, C], of the learner's step."""
        path = self._run.samples(self._learner.step)

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            replace_file(path, encode_png(image_grid(images)))

        if self._leader and self._tried(path.name, write):
            self._tried(TENSORBOARD, lambda: self._events.samples(self._learner.step))

    def complete_checkpoint(self, metrics: Mapping[str, float], quantiles: Sequence[float] | None) -> None:
        """Adds its metrics to the checkpoint of a step that was stopped before they were known."""
        unlogged = self._learner.unlogged.read()
        path = self._run.checkpoint(self._learner.step)
        if self._leader:
            self._tried(path.name, lambda: complete_checkpoint(path, metrics, quantiles, unlogged))

    def due(self) -> bool:
        """Whether it is time to try again to write a checkpoint."""
        return self.owing and self._learner.processes.any(self._leader and time.monotonic() >= self._again_at)

    def checkpoint(
        self,
        metrics: Mapping[str, float],
        quantiles: Sequence[float] | None,
        *,
        last: bool,
        suspected_since: int | None = None,
    ) -> Path | None:
        """Writes a checkpoint of the learner, in the leader; where it is. The others go on.

        `quantiles` are the validation images', where they were scored at this step. The last checkpoint up to the step
        `suspected_since`, after which the run may have diverged, is kept.

        One that cannot be written is owed. The last one of a run is waited for; raises `TrainingError` (`disk_full`).
        """
        unlogged = self._learner.unlogged.read()
        path = self._run.checkpoint(self._learner.step)

        def write() -> None:
            self._append()
            self._run.sync_metrics()
            self._learner.save(
                path,
                metrics=metrics,
                validation_quantiles=quantiles,
                unlogged=unlogged,
                dataset_sha256=self._dataset_sha256,
                warm_start_sha256=self._warm_start_sha256,
            )

        deadline = time.monotonic() + (PATIENCE_SECONDS if last else 0)
        failed = self._leader and not self._tried(path.name, write)
        while failed and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
            failed = not self._tried(path.name, write)
        if self._late_since is not None and not failed:
            self._notes.append(f"{path.name} is written, {time.monotonic() - self._late_since:.0f} s late")
            self._late_since = None
        self.owing = self._learner.processes.any(failed)
        if self.owing and last:
            raise TrainingError(
                "disk_full", f"{path} could not be written for {PATIENCE_SECONDS} s", self._learner.step
            )
        if self._leader:
            self._show()
        if not self._leader or self.owing:
            return None
        self._run.prune(self._learner.training.keep_checkpoints, suspected_since)
        return path

    def _append(self) -> None:
        if self._rows:
            self._run.append_metrics(self._rows)
            self._unshown += self._rows
            self._rows.clear()

    def _show(self) -> None:
        """Brings the event file up to metrics.jsonl; one that could not be written is made anew."""
        rows, self._unshown = self._unshown, []
        self._tried(TENSORBOARD, lambda: self._events.rows(rows))

    def _tried(self, what: str, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            self._again_at = time.monotonic() + _PAUSE_SECONDS
            self._late_since = self._late_since or time.monotonic()
            sentence = f"{what} cannot be written yet, and will be tried again: {error}"
            if not self._notes or self._notes[-1] != sentence:
                self._notes.append(sentence)
            return False
        return True
