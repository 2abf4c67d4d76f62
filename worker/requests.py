"""Requests for jobs, as users write them: closed to unknown fields, and bounded."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, NonNegativeInt, StringConstraints, create_model

from flowpp.config import Frozen, ModelOverrides, TrainingOverrides
from flowpp.presets import PRESETS, find_preset

Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16, description="Up to 16 names with values of your own, to find the job by."),
]

ModelId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=64),
    Field(description="A checkpoint's id, or a training job's, meaning its best checkpoint."),
]
DatasetId = Annotated[str, StringConstraints(min_length=1, max_length=64), Field(description="A dataset's id.")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Seed of all random numbers.")]


def _known_preset(name: str) -> str:
    find_preset(name)
    return name


PresetName = Annotated[
    str,
    StringConstraints(max_length=64),
    AfterValidator(_known_preset),
    Field(description="One of GET /v1/presets.", json_schema_extra={"enum": list(PRESETS)}),
]

ModelChoice = create_model("ModelChoice", __base__=ModelOverrides, preset=(PresetName, ...))
"""A preset, and what to change of it."""


class TrainingRequest(Frozen):
    """Train a model on a dataset."""

    dataset: DatasetId
    model: ModelChoice = Field(description="A preset, and what to change of it.")
    training: TrainingOverrides = Field(  # type: ignore[valid-type]
        default_factory=TrainingOverrides, description="What to change of the preset's recipe."
    )
    resume_from: ModelId | None = Field(
        None,
        description="Warm start: begin with this checkpoint's weights and their average, of a model alike but for its "
        "dropout. Steps, schedule and optimizer begin anew, whatever the recipe.",
    )
    metadata: Metadata = Field({})


class LikelihoodRequest(Frozen):
    """Score images in bits/dim: those of `dataset` that are for validation (all, where none are), or images sent."""

    model: ModelId
    dataset: DatasetId | None = Field(None, description="Its validation images are scored; leave out to send images.")
    importance_samples: int = Field(
        1, ge=1, le=65_536, description="1 gives the variational bound, more a tighter one."
    )
    bits_map: bool = Field(False, description="Also where the bits are spent: artifacts bits_map.npz and bits_map.png.")
    latents: bool = Field(False, description="Also the images' latents: artifact latents.npz.")
    seed: Seed = 0
    metadata: Metadata = Field({})


class Ends(Frozen):
    """Two images of a dataset."""

    dataset: DatasetId
    images: tuple[NonNegativeInt, NonNegativeInt] = Field(
        description="Their indices; training images come first, then those for validation, then those for test."
    )


class SamplingRequest(Frozen):
    """Draw images from a model, or images on the way from one to another in its latent space."""

    model: ModelId
    num_samples: int = Field(16, ge=1, description="How many.")
    temperature: float = Field(1.0, ge=0, le=10, description="Scale of the latents; 1 is the model.")
    between: Ends | None = Field(
        None, description="Interpolate from the first to the second, both included; or send two images as `files`."
    )
    seed: Seed = 0
    metadata: Metadata = Field({})


JobRequest = TrainingRequest | LikelihoodRequest | SamplingRequest


def as_written(request: JobRequest) -> dict[str, Any]:
    """The request as JSON, defaults included where they are not 'as the preset says', and without metadata."""
    written = request.model_dump(mode="json", exclude_none=True)
    written.pop("metadata")
    return written
