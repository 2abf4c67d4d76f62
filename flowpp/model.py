"""Flow++: discrete images to log-likelihoods and latents, and back.

The architecture is the list that `architecture` builds; it reads like the tables of the paper's appendix.
Axes: B batch, C channels, H height, W width. Images are uint8 with values in 0..2**bits-1.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from flowpp.conditioner import Conditioner, Layers, Precision
from flowpp.config import Attention, ModelConfig, Shape, flow_shape, stage_couplings
from flowpp.coupling import AffineCoupling, Coupling, MixtureCoupling
from flowpp.dequantization import (
    ContextNetwork,
    UniformDequantizer,
    VariationalDequantizer,
    normal_log_prob,
    normal_terms,
)
from flowpp.dropout import Dropout
from flowpp.fused import Fusing
from flowpp.initialization import initializing
from flowpp.presets import PRESETS
from flowpp.replay import Pass, Replays
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

ENCODING_MARGIN = 1 / 16


def architecture(
    config: ModelConfig, flow: tuple[str, ...], *, blocks: int, attention: Attention, context_filters: int = 0
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
                yield _coupling(config, half, blocks=blocks, attention=attention, context_filters=context_filters)
                yield Flip()
            if by_columns:
                yield Inverse(Columns())
        shape = flow_shape((stage,), shape)


def _half_shape(shape: Shape, by_columns: bool) -> Shape:
    channels, height, width = shape
    return (channels, height, width // 2) if by_columns else (channels // 2, height, width)


def _coupling(
    config: ModelConfig, half: Shape, *, blocks: int, attention: Attention, context_filters: int
) -> Transform:
    affine = config.coupling == "affine"
    conditioner = Conditioner(
        half,
        half[0] * (2 if affine else 2 + 3 * config.components),
        _layers(config, config.filters, attention),
        blocks=blocks,
        output_elu=config.output_elu,
        context_filters=context_filters,
    )
    return AffineCoupling(conditioner) if affine else MixtureCoupling(conditioner, config.components)


def _layers(config: ModelConfig, filters: int, attention: Attention, norm: bool = True) -> Layers:
    return Layers(filters, config.heads, config.dropout, attention, config.weight_norm, norm)


def _dequantizer(config: ModelConfig) -> UniformDequantizer | VariationalDequantizer:
    declared = config.dequantizer
    if declared.kind == "uniform":
        return UniformDequantizer()
    attention: Attention = "softmax" if declared.context == "attention" else "none"
    context = ContextNetwork(
        config.image_shape,
        config.levels,
        _layers(config, declared.context_filters, attention, norm=declared.context != "convolution"),
        blocks=declared.context_blocks,
    )
    noise_flow = architecture(
        config,
        declared.flow,
        blocks=declared.blocks,
        attention=declared.attention,
        context_filters=declared.context_filters,
    )
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

    checkpoint_sha256: str | None = None
    """Of the file that the weights were loaded from."""
    replays: Replays | None = None
    """Recordings of its passes, after `replay`."""

    def __init__(self, config: ModelConfig | str) -> None:
        super().__init__()
        self.config = PRESETS[config].model if isinstance(config, str) else config
        self.dequantizer = _dequantizer(self.config)
        flow = architecture(self.config, self.config.flow, blocks=self.config.blocks, attention=self.config.attention)
        self.flow = Compose(ImageLogit(self.config.levels), *flow)
        for layer, dropout in enumerate(module for module in self.modules() if isinstance(module, Dropout)):
            dropout.layer = layer

    @torch.no_grad()
    def initialize(self, images: Tensor, generator: torch.Generator | None = None) -> None:
        """Data-dependent initialization of every part from images [B, C, H, W], in one pass."""
        with initializing(self):
            self.log_weight(images, self.draw_noise(len(images), generator))

    def fuse(self, fused: bool) -> None:
        """Computes by kernels where the device has them, as a new model does, or by plain PyTorch alone.

        The numbers are the same but for rounding; dropout is other.
        """
        for module in self.modules():
            if isinstance(module, Fusing):
                module.fused = fused
        self._forget_recordings()

    def replay(self) -> None:
        """From now on, passes over images and latents without gradients on a CPU are recorded and replayed.

        The numbers are the same but for rounding, and sooner there, those of small models and batches above all
        (`flowpp.replay`). A change of the weights is seen, but for one through a parameter's `.data` and a parameter
        in another's place: call this again then.
        """
        self.replays = Replays(self.parameters())

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's."""
        found = super().load_state_dict(*args, **kwargs)
        self._forget_recordings()  # with `assign` the parameters are others
        return found

    def _forget_recordings(self) -> None:
        if self.replays is not None:
            self.replay()

    def _pass(self, name: str, function: Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = inputs[0]
        if self.replays is None or self.training or x.device.type != "cpu" or not len(x):
            return function(*inputs)
        if torch.is_grad_enabled() and any(each.requires_grad for each in (*inputs, *self.replays.parameters)):
            return function(*inputs)
        return self.replays(name, function, *inputs)

    def economize(self, *, bfloat16: bool = False, recompute: bool = False) -> None:
        """Makes training cheaper: conditioners in bfloat16, couplings computed anew in the backward pass.

        What is outside the conditioners, and their last convolution, keeps the dtype of the parameters. To compute
        anew changes no number.
        """
        for module in self.modules():
            if isinstance(precision := getattr(module, "precision", None), Precision):
                precision.bfloat16 = bfloat16
            if isinstance(module, Coupling):
                module.recomputed = recompute
        self._forget_recordings()

    def log_prob(
        self,
        images: Tensor,
        importance_samples: int = 1,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Lower bound on log P(image) in nats: uint8 [B, C, H, W] -> float64 [B].

        One sample gives the variational bound, k samples the importance-weighted one, log (1/k) sum of
        exp(log_weight) (Burda et al., 2016). `noise` [B, C, H, W], or [k, B, C, H, W] for k samples, takes the place
        of `draw_noise`'s. Computed in the dtype of the parameters. Raises `ValueError` for images or noise that are
        not the model's.
        """
        if noise is None:
            draws = (self.draw_noise(len(images), generator) for _ in range(importance_samples))
        else:
            draws = iter(noise if noise.dim() == images.dim() + 1 else noise[None])
            importance_samples = noise.shape[0] if noise.dim() == images.dim() + 1 else 1
        total = self.log_weight(images, next(draws)).double()
        for draw in draws:
            total = torch.logaddexp(total, self.log_weight(images, draw).double())
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
        """log p(x + u) - log q(u|x) in nats, [B], where noise [B, C, H, W] gives u: the sum of `weight_terms`."""
        prior, log_det, dequantizer = self.weight_terms(images, noise)
        return prior + log_det + dequantizer

    def weight_terms(self, images: Tensor, noise: Tensor) -> "WeightTerms":
        """The parts of `log_weight` for noise [B, C, H, W]. Raises `ValueError` as `log_prob` does."""
        return WeightTerms(*self._pass("weight_terms", self._weight_terms, *self._symbols(images, noise)))

    def _weight_terms(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, log_q = self.dequantizer(x, noise)
        z, log_det = self.flow(x + u)
        return normal_log_prob(z), log_det, -log_q

    def dequantize(self, images: Tensor, noise: Tensor) -> Tensor:
        """v = x + u, float [B, C, H, W], of uint8 images [B, C, H, W] under noise as `draw_noise` gives it."""
        x, noise = self._symbols(images, noise)
        return x + self.dequantizer(x, noise)[0]

    def log_density(self, v: Tensor) -> Tensor:
        """log p(v) in nats of continuous images, float [B, C, H, W] within [0, 2**bits] -> [B].

        The flow's own density, without dequantizer, differentiable in v: its gradient is the score of the image.
        """
        self._check(v)
        z, log_det = self.flow(v)
        return normal_log_prob(z) + log_det

    @torch.no_grad()
    def bits_map(self, images: Tensor, noise: Tensor) -> Tensor:
        """Where the bits of images are spent: uint8 [B, C, H, W] -> float64 bits [B, C, H, W] a channel value.

        Each element's part of prior, log-determinant and dequantizer, brought back to its place in the image. The
        sum over an image is -log2 of its weight under this noise, that over D its bits/dim. An element can have
        less than zero: it is the gain of those that are predicted from it.
        """
        x, noise = self._symbols(images, noise)
        u, log_q = self.dequantizer.attribute(x, noise)
        v = x + u
        z, share = self.flow.attribute(v, torch.zeros_like(v))
        share = share + normal_terms(z)
        for stage in reversed(self.config.flow):
            if stage == "squeeze":
                share = Squeeze().restore(share)
        return (log_q.double() - share.double()) / math.log(2)

    @torch.no_grad()
    def encode(
        self, images: Tensor, generator: torch.Generator | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Latents [B, *config.latent_shape] of uint8 images [B, C, H, W], under one draw of the dequantizer.

        The dequantizer's u is kept in [1/16, 15/16], so that rounding cannot carry it into the next value and
        `decode` gives back the same image.
        """
        x, noise = self._symbols(images, self.draw_noise(len(images), generator) if noise is None else noise)
        (z,) = self._pass("encode", self._encode, x, noise)
        return z

    def _encode(self, x: Tensor, noise: Tensor) -> tuple[Tensor]:
        u, _ = self.dequantizer(x, noise)
        z, _ = self.flow(x + u.clamp(ENCODING_MARGIN, 1 - ENCODING_MARGIN))
        return (z,)

    def decode(self, latents: Tensor, *, continuous: bool = False) -> Tensor:
        """Images of latents [B, *config.latent_shape]: uint8 [B, C, H, W], clipped to the data cube.

        With `continuous` they are v = f^-1(z) itself, float [B, C, H, W], which has gradients: in the latents and
        in the parameters.
        """
        if latents.shape[1:] != self.config.latent_shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}; the model's are {self.config.latent_shape}")
        with torch.set_grad_enabled(continuous and torch.is_grad_enabled()):
            (v,) = self._pass("decode", lambda latents: self.flow.inverse(latents)[:1], latents)
        return v if continuous else v.floor().clamp(0, self.config.levels - 1).to(torch.uint8)

    def sample(self, n: int, temperature: float = 1.0, seed: int | None = None, *, continuous: bool = False) -> Tensor:
        """n images as `decode` gives them, uint8 [n, C, H, W], from latents ~ N(0, temperature^2 I)."""
        parameter = next(self.flow.parameters())
        generator = torch.Generator(parameter.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        shape = (n, *self.config.latent_shape)
        z = torch.randn(shape, dtype=parameter.dtype, device=parameter.device, generator=generator)
        return self.decode(temperature * z, continuous=continuous)

    def save(self, directory: str | Path) -> None:
        """Writes the weights and the configuration as a checkpoint directory, whole or not at all."""
        save_model(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu", *, compile: bool = True) -> Self:
        """The model of a checkpoint directory, in evaluation mode, with its EMA weights where it has them.

        `compile=False` is `fuse(False)`: plain PyTorch.
        """
        model = load_model(cls, Path(directory), device)
        model.fuse(compile)
        return model

    def _symbols(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Images and noise in the dtype of the parameters."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images of {images.dtype}; the model takes torch.uint8")
        self._check(images)
        if noise.shape != images.shape:
            raise ValueError(f"noise of shape {tuple(noise.shape)} for images of shape {tuple(images.shape)}")
        if self.config.bits < 8 and images.numel() and int(images.max()) >= self.config.levels:
            raise ValueError(
                f"a channel value of {int(images.max())}; "
                f"a {self.config.bits}-bit model's are below {self.config.levels}"
            )
        noise = noise.to(next(self.flow.parameters()))
        return images.to(noise), noise

    def _check(self, images: Tensor) -> None:
        if images.shape[1:] != self.config.image_shape:
            raise ValueError(
                f"images of {images.dtype} {tuple(images.shape)}; "
                f"the model takes (B, {', '.join(map(str, self.config.image_shape))})"
            )


class WeightTerms(NamedTuple):
    """log p(x + u) - log q(u|x) in parts, each [B] in nats."""

    prior: Tensor
    """log N(z; 0, I)."""
    log_det: Tensor
    """log|det dz/dv| of the main flow."""
    dequantizer: Tensor
    """-log q(u|x)."""
