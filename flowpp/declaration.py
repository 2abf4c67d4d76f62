"""New runs: a preset, what is changed of it, and the images that give the model its shape. Needs no torch."""

import json
import shutil
from pathlib import Path
from typing import Any

from flowpp.config import ModelOverrides
from flowpp.console import BadInput
from flowpp.data import open_image_set
from flowpp.presets import PRESETS, resolve_model, resolve_training
from flowpp.run_directory import CONFIG, RunConfig, RunDirectory, find_checkpoint


def declare_run(
    run: RunDirectory, data: Path, preset: str, steps: int | None, overrides: list[str], resume_from: Path | None
) -> None:
    """Writes config.json of a new run, for the shape of the images of `data`."""
    if (run.path / CONFIG).exists():
        raise BadInput(
            f"{run.path} holds a run already: go on with it by leaving --data away, or name another directory"
        )
    if preset not in PRESETS:
        raise BadInput(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    model, training = _parse_overrides(overrides)
    ModelOverrides(**model)  # refuses the shape, which is the images'
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


def _parse_overrides(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model.filters=48` and the like, as nested dictionaries of the model and of the recipe."""
    parsed: dict[str, Any] = {"model": {}, "training": {}}
    for override in overrides:
        path, equals, text = override.partition("=")
        *sections, field = path.split(".")
        if not equals or sections not in (["model"], ["model", "dequantizer"], ["training"]):
            forms = "model.FIELD=VALUE, model.dequantizer.FIELD=VALUE or training.FIELD=VALUE"
            raise BadInput(f"--set {override}: expected is {forms}")
        place = parsed
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise BadInput(f"--set {override}: {section} was set to {place!r} before")
        place[field] = _parse_value(text)
    return parsed["model"], parsed["training"]


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text  # a bare word
