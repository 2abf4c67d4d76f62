"""Hyperparameters, declared once: constructor argument, checkpoint content, HTTP schema and preset."""

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model, model_validator
from pydantic.fields import FieldInfo

Stage = Annotated[str, StringConstraints(pattern=r"^(squeeze|(columns|channels) x[1-9][0-9]?)$")]
"""One stage of a flow: `squeeze`, or n couplings on a split, as `columns x4` or `channels x2`."""

Attention = Literal["softmax", "maximum", "none"]
"""Of a conditioner's blocks: gated softmax attention, the parameter-matched maximum (ablation), or none."""

HEAD_SIZES = frozenset({4, 8, 16, 24, 26, 32})
"""Features of an attention head for which there is a CPU kernel; others are computed by plain PyTorch."""

LEAST_IMAGES = 4
"""Different images that the initialization of a model needs. From fewer, some elements hardly differ between them by
chance, and their gains have no bound: other images begin near 1e3 bits/dim after two images, and at 1e16 after one."""

Shape = tuple[int, int, int]
"""Channels, height, width."""


def stage_couplings(stage: str) -> int:
    """The number of couplings of a stage: 4 for `columns x4`, 0 for `squeeze`."""
    match = re.search(r" x(\d+)$", stage)
    return int(match.group(1)) if match else 0


def flow_shape(flow: tuple[str, ...], shape: Shape) -> Shape:
    """(channels, height, width) after the stages of `flow`, from `shape`.

    Raises `ValueError` where a stage does not divide the shape that reaches it.
    """
    channels, height, width = shape
    for stage in flow:
        here = f"stage {stage!r} of the flow meets images of {channels} channels, {height} x {width}"
        if stage == "squeeze":
            if height % 2 or width % 2:
                raise ValueError(f"{here}: a squeeze needs an even height and width; {_fitting(flow)}")
            channels, height, width = 4 * channels, height // 2, width // 2
        elif stage.startswith("columns"):
            if width % 2:
                raise ValueError(f"{here}: a column split needs an even width; {_fitting(flow)}")
        elif channels % 2:
            raise ValueError(f"{here}: a channel split needs an even number of channels; squeeze first")
    return channels, height, width


def _fitting(flow: tuple[str, ...]) -> str:
    """Which images the stages take, in words."""
    scale, height, width = 1, 1, 1
    for stage in flow:
        if stage == "squeeze":
            scale *= 2
            height, width = scale, max(width, scale)
        elif stage.startswith("columns"):
            width = max(width, 2 * scale)
    heights = f" and heights that are multiples of {height}" if height > 1 else ""
    return f"this flow takes widths that are multiples of {width}{heights}"


class Frozen(BaseModel):
    """Immutable, closed to unknown fields, and without NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class DequantizerConfig(Frozen):
    """How the discrete image becomes continuous (Flow++ section 3.1)."""

    kind: Literal["variational", "uniform"] = Field(
        "variational", description="Noise from a conditional flow, or uniform noise (the paper's ablation)."
    )
    flow: tuple[Stage, ...] = Field(
        ("columns x4",),
        max_length=16,
        description="Stages of the noise flow, which begins with normal noise; written as those of `model.flow`.",
    )
    blocks: int = Field(2, ge=0, le=64, description="Blocks in the conditioner of each coupling.")
    attention: Attention = Field("softmax", description="Attention in the conditioners of the noise flow.")
    context: Literal["convolution", "normalized", "attention"] = Field(
        "convolution",
        description="Block of the context network: a gated convolution, that with a layer norm, or that with a layer "
        "norm, gated attention and another layer norm.",
    )
    context_filters: int = Field(32, ge=1, le=512, description="Channels of the context network.")
    context_blocks: int = Field(3, ge=0, le=64, description="Blocks of the context network.")


class ModelConfig(Frozen):
    """A Flow++ model, complete: `FlowPP(ModelConfig(...))` needs nothing else.

    The defaults are the paper's CIFAR-10 model. Raises `pydantic.ValidationError` where a stage of the
    flow does not divide the shape that reaches it.
    """

    height: int = Field(32, ge=1, le=256, description="Image height in pixels.")
    width: int = Field(32, ge=2, le=256, description="Image width in pixels.")
    channels: Literal[1, 3] = Field(3, description="Image channels: 1 (grey) or 3 (RGB).")
    bits: int = Field(8, ge=1, le=8, description="Bits of a channel value. Images keep the upper bits of their 8.")
    filters: int = Field(96, ge=1, le=512, description="Channels inside the conditioners.")
    blocks: int = Field(10, ge=0, le=64, description="Blocks (gated convolution, gated attention) of a conditioner.")
    components: int = Field(
        32, ge=1, le=128, description="Logistic components in a coupling's mixture (the paper's K)."
    )
    heads: int = Field(4, ge=1, le=64, description="Attention heads. Their number must divide `filters`.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout probability inside the conditioners.")
    coupling: Literal["mixture", "affine"] = Field(
        "mixture", description="Coupling by a mixture-of-logistics CDF (Flow++ eq. 16), or affine (ablation)."
    )
    attention: Attention = Field(
        "softmax",
        description="Attention in the conditioners of the main flow: gated softmax attention, a maximum with as many "
        "parameters (the paper's ablation), or none.",
    )
    weight_norm: bool = Field(False, description="Weight normalization of every convolution, during training as well.")
    output_elu: bool = Field(False, description="A concat_elu before the last convolution of each conditioner.")
    pointwise: bool = Field(True, description="Invertible 1x1 convolution before each coupling.")
    flow: tuple[Stage, ...] = Field(
        ("columns x4", "squeeze", "channels x2", "columns x3"),
        min_length=1,
        max_length=16,
        description="Stages of the main flow, which begins with the image: `squeeze`, `columns xN` or `channels xN`, "
        "N couplings that split by columns or by channels.",
    )
    dequantizer: DequantizerConfig = Field(
        DequantizerConfig(), description="How the discrete image becomes continuous."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.filters % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide filters ({self.filters})")
        flow_shape(self.flow, self.image_shape)
        if self.dequantizer.kind == "variational":
            if self.width % 2:
                raise ValueError(f"the variational dequantizer needs an even width; the images are {self.width} wide")
            flow_shape(self.dequantizer.flow, self.image_shape)
            if self.dequantizer.context == "attention" and self.dequantizer.context_filters % self.heads:
                raise ValueError(
                    f"heads ({self.heads}) must divide dequantizer.context_filters ({self.dequantizer.context_filters})"
                )
        return self

    @property
    def image_shape(self) -> Shape:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def latent_shape(self) -> Shape:
        """Shape of `encode`'s result: (channels, height, width) after the flow's squeezes."""
        return flow_shape(self.flow, self.image_shape)

    @property
    def dimensions(self) -> int:
        """D, the number of channel values of an image."""
        return self.channels * self.height * self.width

    @property
    def levels(self) -> int:
        """2**bits, the number of values of a channel."""
        return 2**self.bits

    def unlike(self, other: "ModelConfig") -> str | None:
        """Why weights of `other` do not fit this model, in words; none where they do. Dropout has no weights."""
        own, others = self.model_dump(mode="json"), other.model_dump(mode="json")
        for name, value in own.items():
            if name != "dropout" and value != others[name]:
                return f"its {name} is {others[name]}, and the model's {value}"
        return None

    def with_image_shape(self, shape: Shape) -> "ModelConfig":
        """The same model for images of (channels, height, width). Raises `pydantic.ValidationError`."""
        channels, height, width = shape
        return ModelConfig(**{**dict(self), "channels": channels, "height": height, "width": width})


class Milestone(Frozen):
    """A point that the learning rate passes through."""

    step: int = Field(ge=0, le=100_000_000, description="Optimizer step.")
    factor: float = Field(ge=0, le=1, description="Learning rate at this step, relative to `learning_rate`.")


class TrainingConfig(Frozen):
    """How a model is trained. The defaults are the paper's CIFAR-10 recipe."""

    steps: int = Field(312_500, ge=1, le=100_000_000, description="Number of optimizer steps.")
    batch_size: int = Field(64, ge=1, le=65_536, description="Images in one step, all processes together.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Images in one forward pass of a process. Gradients of several passes add up to those of the "
        "batch. By default the whole share of a process, or as many images as fit into memory.",
    )
    num_processes: int = Field(1, ge=1, le=64, description="Processes that share each batch. Each has its own device.")
    activation_checkpointing: bool | None = Field(
        None,
        description="The backward pass recomputes each coupling, which saves memory and takes about a third more "
        "time. By default only if not even one image fits into memory otherwise.",
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        le=65_536,
        description="Memory of its device that a process may use, in GiB. The estimate is right to an eighth. By "
        "default all the memory that is available.",
    )
    conditioner_precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of convolutions and attention during training. Mixtures, log-determinants and all "
        "evaluations use float32.",
    )
    compile: bool = Field(
        True,
        description="Uses kernels that are compiled for the machine, if there are any. They are several times as "
        "fast as plain PyTorch, and give the same numbers up to rounding.",
    )
    init_batch_size: int = Field(128, ge=2, le=65_536, description="Images in the data-dependent initialization.")
    learning_rate: float = Field(3e-4, gt=0, le=1, description="Learning rate of Adam after the warm-up.")
    warmup_steps: int = Field(2_000, ge=0, le=10_000_000, description="Steps of linear warm-up from zero.")
    milestones: tuple[Milestone, ...] = Field(
        (),
        max_length=32,
        description="Points of the learning rate after the warm-up, in the order of steps. Between two points it is "
        "geometric, or linear if one of them is zero. Two points at the same step make a jump. It is constant after "
        "the last point.",
    )
    cooldown_steps: int = Field(
        0, ge=0, le=100_000_000, description="Number of last steps over which the learning rate falls linearly to zero."
    )
    weight_decay: float = Field(
        0,
        ge=0,
        le=1,
        description="Decoupled decay (AdamW) of the weights of convolutions, times the learning rate, in each step. "
        "0 gives Adam.",
    )
    horizontal_flips: bool = Field(False, description="Mirrors each training image with probability 1/2 in each epoch.")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="Decay of the weights' exponential moving average per step."
    )
    gradient_clip: float = Field(1.0, gt=0, le=1e9, description="Upper bound of the global norm of the gradient.")
    log_every: int = Field(100, ge=1, le=1_000_000, description="Steps between training metrics.")
    evaluation_every: int = Field(5_000, ge=1, le=10_000_000, description="Steps between validations.")
    evaluation_images: int = Field(1_000, ge=1, le=1_000_000, description="Most validation images in an evaluation.")
    sample_every: int = Field(5_000, ge=1, le=100_000_000, description="Steps between grids of 16 samples.")
    checkpoint_every: int = Field(5_000, ge=1, le=10_000_000, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, le=1_000, description="Newest checkpoints to keep, besides the best one.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the weights, the data order, the noise and dropout.")

    @property
    def beyond_the_paper(self) -> dict[str, float]:
        """What the recipe has that no recipe of the paper has, by field; metrics name it."""
        options = {
            "horizontal_flips": float(self.horizontal_flips),
            "weight_decay": self.weight_decay,
            "cooldown_steps": float(self.cooldown_steps),
            "bfloat16_conditioners": float(self.conditioner_precision == "bfloat16"),
        }
        return {name: value for name, value in options.items() if value}

    def too_few(self, images: int) -> str | None:
        """Returns why a new model cannot be initialized from so many training images, or None if it can be."""
        if images < LEAST_IMAGES:
            return f"a new model needs at least {LEAST_IMAGES} training images; there are {images:,}"
        if self.init_batch_size < LEAST_IMAGES:
            return f"a new model needs an init_batch_size of at least {LEAST_IMAGES}; it is {self.init_batch_size}"
        return None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.warmup_steps + self.cooldown_steps > self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) and cooldown_steps ({self.cooldown_steps}) together "
                f"exceed steps ({self.steps})"
            )
        if self.num_processes > self.batch_size:
            raise ValueError(f"num_processes ({self.num_processes}) exceeds batch_size ({self.batch_size})")
        steps = [self.warmup_steps, *(milestone.step for milestone in self.milestones)]
        if steps != sorted(steps):
            raise ValueError(f"milestones must be in the order of their steps, after the warm-up: {steps}")
        return self


SHAPE_FIELDS = frozenset({"height", "width", "channels"})


def _overrides(name: str, declared: type[Frozen], **instead: Any) -> type[Frozen]:
    """A closed model with every field of `declared` optional, bounds and descriptions kept, or as in `instead`."""
    fields: dict[str, Any] = {
        field: (_bounded(info) | None, Field(None, description=f"{info.description}{_default_of(info)}"))
        for field, info in declared.model_fields.items()
        if field not in SHAPE_FIELDS | instead.keys()
    }
    return create_model(name, __base__=Frozen, __doc__=declared.__doc__, **{**fields, **instead})


def _bounded(info: FieldInfo) -> Any:
    """The type of a field with its bounds. A description in here would describe a part of the union with None."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _default_of(info: FieldInfo) -> str:
    if info.default is None:  # the description covers that case
        return ""
    default = info.default if isinstance(info.default, str) else json.dumps(info.default)
    return f" Default: the preset's, which is {default} if the preset does not say otherwise."


DequantizerOverrides = _overrides("DequantizerOverrides", DequantizerConfig)

ModelOverrides = _overrides(
    "ModelOverrides",
    ModelConfig,
    dequantizer=(DequantizerOverrides | None, Field(None, description="Changes of the dequantizer.")),
)
"""What a user may change of a preset's model; the image shape comes from the dataset."""

TrainingOverrides = _overrides("TrainingOverrides", TrainingConfig)
"""What a user may change of a preset's recipe."""
