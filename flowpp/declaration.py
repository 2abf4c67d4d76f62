"""New runs: a preset, what is changed of it, and the images that give the model its shape. Needs no torch."""

import shutil
from pathlib import Path

from flowpp.console import BadInput
from flowpp.data import open_image_set
from flowpp.overrides import parse_overrides
from flowpp.presets import find_preset, resolve_model, resolve_training
from flowpp.run_directory import CONFIG, RunConfig, RunDirectory, find_checkpoint


def declare_run(
    run: RunDirectory, data: Path, preset: str, steps: int | None, overrides: list[str], resume_from: Path | None
) -> None:
    """Writes config.json of a new run, for the shape of the images of `data`."""
    if (run.path / CONFIG).exists():
        raise BadInput(
            f"{run.path} holds a run already: go on with it by leaving --data away, or name another directory"
        )
    try:
        find_preset(preset)
        model, training = parse_overrides(overrides)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if steps is not None:
        training["steps"] = steps
    recipe = resolve_training(preset, training)
    origin = None if resume_from is None else str(find_checkpoint(resume_from).resolve())
    existed = run.path.exists()
    try:
        shape = open_image_set(data, run.images).shape
        resolved = resolve_model(preset, model, shape)
        run.write_config(RunConfig(model=resolved, training=recipe, data=str(data.resolve()), resume_from=origin))
    except BaseException:
        if not existed:
            shutil.rmtree(run.path, ignore_errors=True)
        raise
