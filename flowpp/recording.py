"""What a run leaves when it ends, however it ends: result.json and the training curve."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flowpp.checkpoint import newest_complete, read_manifest
from flowpp.decoration import decoration
from flowpp.run_directory import CURVE, RESULT, Code, Result, RunDirectory, TrainingError

NO_CHECKPOINT = "there is no checkpoint yet"


@dataclass
class Recorder:
    """Is told the last `step`, and holds the `result` in the end."""

    step: int = 0
    result: Result | None = None

    @property
    def sentence(self) -> str:
        """The result for a person."""
        assert self.result is not None
        best = f", the best is {self.result.best_checkpoint}" if self.result.best_checkpoint else ""
        last = f"the last checkpoint is {self.result.last_checkpoint}" if self.result.last_checkpoint else NO_CHECKPOINT
        return f"{self.result.status} at step {self.step}; {last}{best}"


@contextmanager
def record_failure(run: RunDirectory) -> Iterator[None]:
    """For the other processes of a run: writes a result where the block raises `TrainingError`; it is raised on."""
    try:
        yield
    except TrainingError as error:
        run.write_result(Result(status="failed", step=error.step or 0, code=error.code, message=str(error)))
        raise


@contextmanager
def record(run: RunDirectory, alone: bool = True) -> Iterator[Recorder]:
    """Removes an older result, and writes one at the end of the block.

    That is succeeded after the steps of the recipe, stopped before, failed by what the block raises; it is raised on.
    A process that is not `alone` leaves no result of a `RuntimeError`: it may be but the end of another process, which
    has written its own, or was killed.
    """
    (run.path / RESULT).unlink(missing_ok=True)
    checkpoint = newest_complete(run.path)
    recorder = Recorder(read_manifest(checkpoint).step if checkpoint else 0)
    try:
        yield recorder
    except KeyboardInterrupt:
        message = "interrupted before a checkpoint of the last steps was written"
        _finish(run, recorder, Result(status="stopped", step=recorder.step, message=message))
        raise
    except BaseException as error:
        if isinstance(error, RuntimeError) and not alone:
            raise
        message = str(error) if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
        code: Code = error.code if isinstance(error, TrainingError) else "internal"
        _finish(run, recorder, Result(status="failed", step=recorder.step, code=code, message=message))
        raise
    status = "succeeded" if recorder.step >= run.config.training.steps else "stopped"
    _finish(run, recorder, Result(status=status, step=recorder.step))


def _finish(run: RunDirectory, recorder: Recorder, result: Result) -> None:
    recorder.result = run.write_result(result)
    if rows := run.read_metrics():
        with decoration(run.path / CURVE):
            from flowpp.plots import write_training_curve

            write_training_curve(rows, run.path / CURVE)
