"""Dequantizers: noise u in [0, 1] for each channel value of a discrete image, and its log density.

Axes: B batch, C channels, H height, W width.
"""

import math

import torch
from torch import Tensor, nn

from flowpp.conditioner import Block, Convolution, Layers, Precision
from flowpp.config import Shape
from flowpp.initialization import normal
from flowpp.transforms import Columns, Transform, sum_dimensions


def normal_terms(z: Tensor) -> Tensor:
    """log N(z; 0, 1) in nats, elementwise."""
    return -0.5 * (z.square() + math.log(2 * math.pi))


def normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) in nats: [B, ...] -> [B]."""
    return sum_dimensions(normal_terms(z))


class UniformDequantizer(nn.Module):
    """q(u|x) = 1 on the unit cube (ablation). The noise is u itself."""

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(u [B, C, H, W], log q(u|x) [B] in nats) for uniform noise [B, C, H, W]."""
        return noise, noise.new_zeros(len(noise))

    def attribute(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(u, the terms of log q(u|x)), both [B, C, H, W]."""
        return noise, torch.zeros_like(noise)

    def draw_noise(self, shape: tuple[int, ...], **like: object) -> Tensor:
        """Uniform noise in [0, 1) of `shape`; `like` holds dtype, device and generator."""
        return torch.rand(shape, **like)  # type: ignore[call-overload]

    def check_noise(self, noise: Tensor) -> None:
        """Raises `ValueError` for noise beyond the unit cube, such as normal noise: it would change the image."""
        if noise.numel() and not bool(((noise >= 0) & (noise <= 1)).all()):
            raise ValueError("noise beyond [0, 1]; a uniform dequantizer takes uniform noise, as draw_noise gives it")


class VariationalDequantizer(nn.Module):
    """u = g_x(epsilon), epsilon ~ N(0, I): log q(u|x) = log N(epsilon; 0, I) - log|det du/depsilon|.

    `flow` ends in a sigmoid and takes as context what the context network makes of the image (Flow++
    section 3.1).
    """

    def __init__(self, context: "ContextNetwork", flow: Transform) -> None:
        super().__init__()
        self.context = context
        self.flow = flow

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(u [B, C, H, W], log q(u|x) [B] in nats) for normal noise [B, C, H, W] and images in 0..levels-1."""
        u, log_det = self.flow(noise, self.context(images))
        return u, normal_log_prob(noise) - log_det

    def attribute(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(u, the terms of log q(u|x)), both [B, C, H, W]: each where its noise became a part of the image."""
        u, share = self.flow.attribute(noise, -normal_terms(noise), self.context(images))
        return u, -share

    def draw_noise(self, shape: tuple[int, ...], **like: object) -> Tensor:
        """Standard normal noise of `shape`; `like` holds dtype, device and generator."""
        return torch.randn(shape, **like)  # type: ignore[call-overload]

    def check_noise(self, noise: Tensor) -> None:
        """Accepts all noise: the flow maps any number into the unit cube."""


class ContextNetwork(nn.Module):
    """Discrete images of `shape` [B, C, H, W] -> features [B, filters, H, W/2].

    x/levels - 1/2, split by columns, a 3x3 convolution and blocks whose gates are 3x3 convolutions. Blocks with
    attention share a position embedding of their own.
    """

    def __init__(self, shape: Shape, levels: int, layers: Layers, *, blocks: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.levels = levels
        self.columns = Columns()
        with_attention = layers.attention != "none"
        embedding = (layers.filters, height, width // 2)
        self.position = nn.Parameter(normal(0.01, *embedding)) if with_attention else None
        self.proj_in = Convolution(2 * channels, layers.filters, kernel=3, weight_norm=layers.weight_norm)
        self.blocks = nn.ModuleList(Block(layers, gate_kernel=3) for _ in range(blocks))
        self.precision = Precision()

    def forward(self, images: Tensor) -> Tensor:
        x, _ = self.columns(images / self.levels - 0.5)
        with self.precision.reduced(x):
            h = self.proj_in(x.contiguous(memory_format=torch.channels_last))
            for block in self.blocks:
                h = block(h, self.position)
        return h.to(x.dtype)
