"""Flow++: discrete images to log-likelihoods and latents, and back.

The architecture is the list that `architecture` builds; it reads like the tables of the paper's appendix.
Axes: B batch, C channels, H height, W width. Images are uint8 with values in 0..2**bits-1.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from flowpp.conditioner import Conditioner
from flowpp.config import PRESETS, ModelConfig, Shape, flow_shape, stage_couplings
from flowpp.coupling import AffineCoupling, MixtureCoupling
from flowpp.dequantization import ContextNetwork, UniformDequantizer, VariationalDequantizer, normal_log_prob
from flowpp.initialization import initializing
from flowpp.transforms import (
    Columns,
    Compose,
    Flip,
    ImageLogit,
    Inverse,
    Normalization,
    Pointwise,
    Sigmoid,
    Squeeze,
    Transform,
)
from flowpp.weights import load_model, save_model


def architecture(
    config: ModelConfig, flow: tuple[str, ...], *, blocks: int, context_filters: int = 0
) -> Iterator[Transform]:
    """The transforms of `flow`'s stages, for images of `config.image_shape`.

    A stage of n couplings is: split, n x [normalization, (pointwise), coupling, flip], merge.
    """
    shape = config.image_shape
    for stage in flow:
        if stage == "squeeze":
            yield Squeeze()
        else:
            by_columns = stage.startswith("columns")
            if by_columns:
                yield Columns()
            half = _half_shape(shape, by_columns)
            for _ in range(stage_couplings(stage)):
                yield Normalization((2 * half[0], *half[1:]))
                if config.pointwise:
                    yield Pointwise(half[0])
                yield _coupling(config, half, blocks=blocks, context_filters=context_filters)
                yield Flip()
            if by_columns:
                yield Inverse(Columns())
        shape = flow_shape((stage,), shape)


def _half_shape(shape: Shape, by_columns: bool) -> Shape:
    channels, height, width = shape
    return (channels, height, width // 2) if by_columns else (channels // 2, height, width)


def _coupling(config: ModelConfig, half: Shape, *, blocks: int, context_filters: int) -> Transform:
    affine = config.coupling == "affine"
    conditioner = Conditioner(
        half,
        outputs=half[0] * (2 if affine else 2 + 3 * config.components),
        filters=config.filters,
        blocks=blocks,
        heads=config.heads,
        dropout=config.dropout,
        attention=config.attention,
        context_filters=context_filters,
    )
    return AffineCoupling(conditioner) if affine else MixtureCoupling(conditioner, config.components)


def _dequantizer(config: ModelConfig) -> UniformDequantizer | VariationalDequantizer:
    declared = config.dequantizer
    if declared.kind == "uniform":
        return UniformDequantizer()
    context = ContextNetwork(
        config.channels,
        config.levels,
        filters=declared.context_filters,
        blocks=declared.context_blocks,
        dropout=config.dropout,
    )
    noise_flow = architecture(config, declared.flow, blocks=declared.blocks, context_filters=declared.context_filters)
    return VariationalDequantizer(context, Compose(*noise_flow, *_undo_squeezes(declared.flow), Sigmoid()))


def _undo_squeezes(flow: tuple[str, ...]) -> Iterator[Transform]:
    for stage in flow:
        if stage == "squeeze":
            yield Inverse(Squeeze())


class FlowPP(nn.Module):
    """A Flow++ model: `FlowPP("cifar10")` is the paper's, with 31,443,440 parameters.

    Takes a `ModelConfig` or the name of a preset. Raises `KeyError` for an unknown preset. Before it is
    trained it wants `initialize` with a batch of images.
    """

    def __init__(self, config: ModelConfig | str) -> None:
        super().__init__()
        self.config = PRESETS[config].model if isinstance(config, str) else config
        self.dequantizer = _dequantizer(self.config)
        self.flow = Compose(
            ImageLogit(self.config.levels), *architecture(self.config, self.config.flow, blocks=self.config.blocks)
        )

    @torch.no_grad()
    def initialize(self, images: Tensor, generator: torch.Generator | None = None) -> None:
        """Data-dependent initialization of every part from images [B, C, H, W], in one pass."""
        with initializing(self):
            self.log_weight(images, self.draw_noise(len(images), generator))

    def log_prob(self, images: Tensor, importance_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Lower bound on log P(image) in nats: uint8 [B, C, H, W] -> float64 [B].

        One sample gives the variational bound, k samples the importance-weighted one, log (1/k) sum of
        exp(log_weight) (Burda et al., 2016). Raises `ValueError` for images that are not the model's.
        """
        total = self.log_weight(images, self.draw_noise(len(images), generator)).double()
        for _ in range(importance_samples - 1):
            log_weight = self.log_weight(images, self.draw_noise(len(images), generator))
            total = torch.logaddexp(total, log_weight.double())
        return total - math.log(importance_samples)

    def bits_per_dim(
        self, images: Tensor, importance_samples: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """Upper bound on -log2 P(image) / D in bits/dim: uint8 [B, C, H, W] -> float64 [B]."""
        return self.log_prob(images, importance_samples, generator) / (-math.log(2) * self.config.dimensions)

    def draw_noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """What the dequantizer makes its u from: normal (variational) or uniform noise [n, C, H, W]."""
        parameter = next(self.flow.parameters())
        shape = (n, *self.config.image_shape)
        return self.dequantizer.draw_noise(shape, dtype=parameter.dtype, device=parameter.device, generator=generator)

    def log_weight(self, images: Tensor, noise: Tensor) -> Tensor:
        """log p(x + u) - log q(u|x) in nats, [B], where noise [B, C, H, W] gives u."""
        x = self._symbols(images, noise)
        u, log_q = self.dequantizer(x, noise)
        z, log_det = self.flow(x + u)
        return normal_log_prob(z) + log_det - log_q

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, *config.latent_shape] of uint8 images [B, C, H, W], under one draw of the dequantizer."""
        noise = self.draw_noise(len(images), generator)
        x = self._symbols(images, noise)
        u, _ = self.dequantizer(x, noise)
        z, _ = self.flow(x + u)
        return z

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images [B, C, H, W] of latents [B, *config.latent_shape], clipped to the data cube."""
        if latents.shape[1:] != self.config.latent_shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}; the model's are {self.config.latent_shape}")
        v, _ = self.flow.inverse(latents)
        return v.floor().clamp(0, self.config.levels - 1).to(torch.uint8)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, seed: int | None = None) -> Tensor:
        """n images, uint8 [n, C, H, W], from latents ~ N(0, temperature^2 I)."""
        parameter = next(self.flow.parameters())
        generator = torch.Generator(parameter.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        shape = (n, *self.config.latent_shape)
        z = torch.randn(shape, dtype=parameter.dtype, device=parameter.device, generator=generator)
        return self.decode(temperature * z)

    def save(self, directory: str | Path) -> None:
        """Writes the weights and the configuration as a checkpoint directory, whole or not at all."""
        save_model(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> Self:
        """The model of a checkpoint directory, in evaluation mode, with its EMA weights where it has them."""
        return load_model(cls, Path(directory), device)

    def _symbols(self, images: Tensor, noise: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1:] != self.config.image_shape:
            raise ValueError(
                f"images of {images.dtype} {tuple(images.shape)}; "
                f"the model takes torch.uint8 (B, {', '.join(map(str, self.config.image_shape))})"
            )
        if self.config.bits < 8 and images.numel() and int(images.max()) >= self.config.levels:
            raise ValueError(
                f"a channel value of {int(images.max())}; "
                f"a {self.config.bits}-bit model's are below {self.config.levels}"
            )
        return images.to(noise)
