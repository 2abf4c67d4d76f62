"""The named models with their recipes: the paper's, its ablations, and CPU sizes."""

from typing import Any

from flowpp.config import DequantizerConfig, Frozen, Milestone, ModelConfig, Shape, TrainingConfig
from flowpp.names import meant

PUBLISHED = ("cifar10", "imagenet32", "imagenet64")
"""The presets whose weights the authors published."""


class Preset(Frozen):
    """A named model with the recipe that trains it."""

    description: str
    model: ModelConfig
    training: TrainingConfig


_CIFAR10 = ModelConfig()

_IMAGENET32 = ModelConfig(
    filters=128,
    blocks=20,
    dropout=0,
    pointwise=False,
    weight_norm=True,
    output_elu=True,
    flow=("columns x4", "columns x3", "squeeze", "channels x3", "columns x3"),
    dequantizer=DequantizerConfig(flow=("columns x4", "columns x4"), blocks=8, context="attention", context_blocks=8),
)

_IMAGENET64 = ModelConfig(
    height=64,
    width=64,
    blocks=16,
    components=4,
    dropout=0,
    pointwise=False,
    output_elu=True,
    flow=(
        *("squeeze", "columns x4"),
        *("squeeze", "channels x2", "columns x2"),
        *("squeeze", "channels x2", "columns x2"),
    ),
    dequantizer=DequantizerConfig(blocks=5, attention="none", context="normalized", context_blocks=5),
)


def _changed(model: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig(**{**dict(model), **changes})


def _milestones(*points: tuple[int, float]) -> tuple[Milestone, ...]:
    return tuple(Milestone(step=step, factor=factor) for step, factor in points)


def _celeba64(bits: int) -> Preset:
    return Preset(
        description=f"The paper's CelebA 64x64 model of {bits}-bit images, 73,489,960 parameters.",
        model=_changed(_IMAGENET64, bits=bits),
        training=TrainingConfig(
            steps=77_142,
            batch_size=56,
            init_batch_size=56,
            learning_rate=4e-5,
            warmup_steps=20_000,
            milestones=_milestones((50_000, 1), (52_772, 0.25)),
        ),
    )


PRESETS: dict[str, Preset] = {
    "cifar10": Preset(
        description="The paper's CIFAR-10 model, 31,443,440 parameters: a GPU and days.",
        model=_CIFAR10,
        training=TrainingConfig(),
    ),
    "imagenet32": Preset(
        description="The paper's ImageNet 32x32 model, 168,955,724 parameters: GPUs and weeks.",
        model=_IMAGENET32,
        training=TrainingConfig(
            steps=640_574,
            batch_size=32,
            init_batch_size=32,
            learning_rate=1e-3,
            warmup_steps=5_000,
            milestones=_milestones((50_000, 1), (74_079, 0.3)),
            ema_decay=0.999222,
        ),
    ),
    "imagenet64": Preset(
        description="The paper's ImageNet 64x64 model, 73,489,960 parameters: GPUs and weeks.",
        model=_IMAGENET64,
        training=TrainingConfig(
            steps=300_000,
            batch_size=72,
            init_batch_size=72,
            learning_rate=4e-4,
            warmup_steps=10_000,
            milestones=_milestones((50_000, 1), (55_000, 0.75), (230_000, 0.75), (230_000, 0), (240_000, 0.025)),
        ),
    ),
    "imagenet64-5bit": Preset(
        description="The paper's ImageNet 64x64 model of 5-bit images, 73,489,960 parameters.",
        model=_changed(_IMAGENET64, bits=5),
        training=TrainingConfig(
            steps=213_524,
            batch_size=60,
            init_batch_size=60,
            learning_rate=4e-4,
            warmup_steps=10_000,
            milestones=_milestones((50_000, 1), (50_575, 0.75), (110_000, 0.75), (110_000, 0), (130_000, 0.025)),
        ),
    ),
    "celeba64-5bit": _celeba64(bits=5),
    "celeba64-3bit": _celeba64(bits=3),
    "cifar10-uniform-dequantization": Preset(
        description="The paper's ablation: uniform dequantization, 104 filters, 32,324,408 parameters.",
        model=_changed(_CIFAR10, filters=104, dequantizer=DequantizerConfig(kind="uniform")),
        training=TrainingConfig(),
    ),
    "cifar10-affine": Preset(
        description="The paper's ablation: affine couplings everywhere, 108 filters, 32,045,708 parameters.",
        model=_changed(_CIFAR10, filters=108, coupling="affine"),
        training=TrainingConfig(),
    ),
    "cifar10-no-attention": Preset(
        description="The paper's ablation: a maximum in attention's place everywhere, 31,443,440 parameters.",
        model=_changed(_CIFAR10, attention="maximum", dequantizer=DequantizerConfig(attention="maximum")),
        training=TrainingConfig(),
    ),
    "small": Preset(
        description="The demo's model: minutes on two CPU cores.",
        model=ModelConfig(
            filters=32,
            blocks=1,
            components=4,
            heads=2,
            dropout=0,
            flow=("squeeze", "columns x2", "channels x2", "squeeze", "channels x2"),
            dequantizer=DequantizerConfig(flow=("columns x1",), blocks=1, context_filters=16, context_blocks=1),
        ),
        training=TrainingConfig(
            steps=1_200,
            batch_size=32,
            learning_rate=6e-3,
            warmup_steps=50,
            cooldown_steps=500,
            ema_decay=0.98,
            log_every=5,
            evaluation_every=100,
            evaluation_images=128,
            sample_every=200,
            checkpoint_every=200,
        ),
    ),
    "tiny": Preset(
        description="Trains in seconds on one CPU core: for tests and a first look.",
        model=ModelConfig(
            filters=8,
            blocks=1,
            components=2,
            heads=2,
            dropout=0,
            flow=("columns x1", "squeeze", "channels x1"),
            dequantizer=DequantizerConfig(flow=("columns x1",), blocks=1, context_filters=4, context_blocks=1),
        ),
        training=TrainingConfig(
            steps=20,
            batch_size=8,
            init_batch_size=16,
            learning_rate=3e-3,
            warmup_steps=5,
            ema_decay=0.9,
            log_every=1,
            evaluation_every=10,
            evaluation_images=16,
            sample_every=10,
            checkpoint_every=10,
        ),
    ),
}
"""The paper's models and CPU sizes. `height`, `width` and `channels` come from the dataset."""


def find_preset(name: str) -> Preset:
    """Returns the preset of this name. Raises `ValueError`, with the nearest names, if there is none."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {meant(name, PRESETS)}")
    return PRESETS[name]


def resolve_model(preset: str, overrides: dict[str, Any], image_shape: Shape) -> ModelConfig:
    """The preset's model with `overrides`, for images of (channels, height, width).

    Raises `KeyError` for an unknown preset, `pydantic.ValidationError` for values that do not fit.
    """
    channels, height, width = image_shape
    shape = {"channels": channels, "height": height, "width": width}
    declared = PRESETS[preset].model.model_dump()
    dequantizer = {**declared["dequantizer"], **overrides.get("dequantizer", {})}
    return ModelConfig(**{**declared, **overrides, "dequantizer": dequantizer, **shape})


def resolve_training(preset: str, overrides: dict[str, Any]) -> TrainingConfig:
    """The preset's recipe with `overrides`; for fewer steps, the schedule shrinks where the user did not choose it.

    Raises `KeyError` for an unknown preset, `pydantic.ValidationError` for values that do not fit.
    """
    recipe = PRESETS[preset].training
    values = {**dict(recipe), **overrides}
    steps = overrides.get("steps")
    if isinstance(steps, int) and 0 < steps < recipe.steps:
        for name in {"warmup_steps", "cooldown_steps"} - overrides.keys():
            values[name] = getattr(recipe, name) * steps // recipe.steps
        if "milestones" not in overrides:
            values["milestones"] = _milestones(
                *((point.step * steps // recipe.steps, point.factor) for point in recipe.milestones)
            )
    return TrainingConfig(**values)
