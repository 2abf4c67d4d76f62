"""Hyperparameters: bounds, shapes, presets, and what a user may change of them."""

import math

import pytest
from pydantic import ValidationError

from flowpp.config import DequantizerConfig, ModelConfig, ModelOverrides, TrainingConfig, TrainingOverrides
from flowpp.presets import PRESETS, resolve_model, resolve_training


def test_a_configuration_survives_json() -> None:
    for preset in PRESETS.values():
        assert ModelConfig.model_validate_json(preset.model.model_dump_json()) == preset.model
        assert TrainingConfig.model_validate_json(preset.training.model_dump_json()) == preset.training


def test_a_configuration_is_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().filters = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ModelConfig(filter=3)  # type: ignore[call-arg]


BAD_MODELS = [
    ({"filters": 0}, "filters"),
    ({"filters": -96}, "filters"),
    ({"filters": 10**9}, "filters"),
    ({"heads": 5}, "heads \\(5\\) must divide filters \\(96\\)"),
    ({"dropout": math.nan}, "dropout"),
    ({"dropout": 1.0}, "dropout"),
    ({"bits": 9}, "bits"),
    ({"channels": 4}, "channels"),
    ({"flow": ()}, "flow"),
    ({"flow": ("squeezes",)}, "flow"),
    ({"flow": ("columns x0",)}, "flow"),
    ({"flow": ("channels x2",)}, "3 channels.*an even number of channels"),
    ({"height": 33}, "'squeeze'.*33 x 32.*an even height and width"),
    ({"width": 31}, "'columns x4'.*an even width"),
    ({"width": 31, "flow": ("columns x1",)}, "an even width"),
    ({"height": 10, "flow": ("squeeze", "squeeze")}, "12 channels, 5 x 16"),
    ({"dequantizer": {"flow": ("squeeze", "squeeze", "squeeze")}, "height": 4}, "'squeeze'"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_MODELS)
def test_a_model_that_cannot_be_is_refused_and_told_why(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ModelConfig(**change)  # type: ignore[arg-type]


BAD_RECIPES = [
    {"learning_rate": math.nan},
    {"learning_rate": math.inf},
    {"learning_rate": -1e-3},
    {"learning_rate": 10.0},
    {"steps": 0},
    {"steps": 10**12},
    {"batch_size": 0},
    {"ema_decay": 1.0},
    {"gradient_clip": 0.0},
    {"steps": 10, "warmup_steps": 8, "cooldown_steps": 3},
]


@pytest.mark.parametrize("change", BAD_RECIPES)
def test_a_recipe_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig(**change)  # type: ignore[arg-type]


def test_the_cifar10_preset_is_the_papers_recipe() -> None:
    model, training = PRESETS["cifar10"].model, PRESETS["cifar10"].training
    assert (model.filters, model.blocks, model.components, model.heads, model.dropout) == (96, 10, 32, 4, 0.2)
    assert model.flow == ("columns x4", "squeeze", "channels x2", "columns x3")
    assert model.dequantizer == DequantizerConfig(flow=("columns x4",), blocks=2, context_filters=32, context_blocks=3)
    assert (training.learning_rate, training.warmup_steps, training.cooldown_steps) == (3e-4, 2000, 0)
    assert (training.batch_size, training.init_batch_size) == (64, 128)
    assert (training.ema_decay, training.gradient_clip) == (0.999, 1.0)


def test_a_presets_shape_comes_from_the_images() -> None:
    model = resolve_model("tiny", {"filters": 12}, (1, 4, 64))
    assert (model.image_shape, model.filters, model.latent_shape) == ((1, 4, 64), 12, (4, 2, 32))


def test_part_of_a_dequantizer_may_be_changed() -> None:
    model = resolve_model("tiny", {"dequantizer": {"blocks": 3}}, (3, 32, 32))
    assert model.dequantizer == PRESETS["tiny"].model.dequantizer.model_copy(update={"blocks": 3})


def test_overrides_keep_the_bounds_and_know_no_shape() -> None:
    assert ModelOverrides(filters=48).model_dump(exclude_none=True) == {"filters": 48}
    for bad in ({"filters": -1}, {"height": 32}, {"dequantizer": {"blocks": 65}}):
        with pytest.raises(ValidationError):
            ModelOverrides(**bad)
    with pytest.raises(ValidationError):
        TrainingOverrides(learning_rate=math.nan)


def test_fewer_steps_shorten_warm_up_and_cool_down_unless_they_are_chosen() -> None:
    recipe = PRESETS["small"].training
    shorter = resolve_training("small", {"steps": recipe.steps // 4})
    assert shorter.warmup_steps == recipe.warmup_steps // 4
    assert shorter.cooldown_steps == recipe.cooldown_steps // 4
    with pytest.raises(ValidationError, match="exceed steps"):
        resolve_training("small", {"steps": 10, "warmup_steps": 20})


def test_an_unknown_preset_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match="unknown preset 'cifar'; did you mean cifar10"):
        resolve_model("cifar", {}, (3, 32, 32))
