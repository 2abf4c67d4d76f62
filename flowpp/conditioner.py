"""The networks inside the couplings: gated convolutions and gated attention, layer norm after each.

Axes: B batch, F filters, H height, W width; feature maps are [B, F, H, W] in channels-last memory.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, elu, glu, layer_norm, scaled_dot_product_attention

from flowpp.initialization import DataDependent


def concat_elu(x: Tensor) -> Tensor:
    """elu of x and -x, concatenated: [B, F, H, W] -> [B, 2F, H, W]."""
    return elu(torch.cat([x, -x], dim=1))


class Convolution(DataDependent):
    """kernel x kernel convolution, same padding.

    Weight ~ N(0, 0.05^2), bias 0; data-dependent initialization scales both so that each output channel has
    mean 0 and standard deviation `init_scale` over the batch and positions (authors' conv2d, nin).
    """

    def __init__(self, channels: int, filters: int, kernel: int, init_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(filters, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(filters))
        self.init_scale = init_scale

    def initialize(self, x: Tensor) -> None:
        self.bias.zero_()
        variance, mean = torch.var_mean(self._convolve(x), dim=(0, 2, 3), correction=0)
        scale = self.init_scale * torch.rsqrt(variance + 1e-10)
        self.weight.mul_(scale[:, None, None, None])
        self.bias.copy_(-mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        self.initialize_from(x)
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class LayerNorm(nn.Module):
    """Normalizes over the channels at each position, eps 1e-5, with a gain and a bias a channel."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(filters))
        self.bias = nn.Parameter(torch.zeros(filters))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return layer_norm(x, x.shape[-1:], self.gain, self.bias, eps=1e-5).permute(0, 3, 1, 2)


class GatedConvolution(nn.Module):
    """x + gate(conv(dropout(concat_elu(conv3x3(concat_elu(x)) + conv1x1(concat_elu(context)))))).

    gate(h) = first half of h's channels * sigmoid(second half).
    """

    def __init__(self, filters: int, context_filters: int, dropout: float, gate_kernel: int = 1) -> None:
        super().__init__()
        self.proj_in = Convolution(2 * filters, filters, kernel=3)
        self.proj_context = Convolution(2 * context_filters, filters, kernel=1) if context_filters else None
        self.dropout = nn.Dropout(dropout)
        self.proj_gate = Convolution(2 * filters, 2 * filters, kernel=gate_kernel, init_scale=0.1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.proj_in(concat_elu(x))
        if self.proj_context is not None:
            assert context is not None
            h = h + self.proj_context(concat_elu(context))
        return x + glu(self.proj_gate(self.dropout(concat_elu(h))), dim=1)


class GatedAttention(nn.Module):
    """x + gate(conv1x1(dropout(attention(conv1x1(x + position))))), over all H W positions, without mask.

    qkv channels are ordered (q, k, v), then heads, then features. Without attention (ablation) the 3F
    channels are read as (F, 3), filter-major, and their maximum over the 3 takes its place.
    """

    def __init__(self, filters: int, heads: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.proj_in = Convolution(filters, 3 * filters, kernel=1)
        self.dropout = nn.Dropout(dropout)
        self.proj_gate = Convolution(filters, 2 * filters, kernel=1, init_scale=0.1)
        self.heads = heads
        self.attention = attention

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        h = self.proj_in(x + position)
        h = self._attend(h) if self.attention else h.unflatten(1, (-1, 3)).amax(2)
        return x + glu(self.proj_gate(self.dropout(h)), dim=1)

    def _attend(self, h: Tensor) -> Tensor:
        height = h.shape[2]
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # [B, HW, 3F]
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, HW, F/heads] each
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, F]
        return h.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Gated convolution, layer norm, gated attention, layer norm."""

    def __init__(self, filters: int, heads: int, dropout: float, attention: bool, context_filters: int) -> None:
        super().__init__()
        self.convolution = GatedConvolution(filters, context_filters, dropout)
        self.norm1 = LayerNorm(filters)
        self.attention = GatedAttention(filters, heads, dropout, attention)
        self.norm2 = LayerNorm(filters)

    def forward(self, x: Tensor, position: Tensor, context: Tensor | None) -> Tensor:
        x = self.norm1(self.convolution(x, context))
        return self.norm2(self.attention(x, position))


class Conditioner(nn.Module):
    """[B, C, H, W] (and a context [B, context_filters, H, W]) -> [B, outputs, H, W].

    A 3x3 convolution, `blocks` blocks that share one learned position embedding (F, H, W) ~ N(0, 0.01^2), and
    a 3x3 convolution that starts small.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int,
        *,
        filters: int,
        blocks: int,
        heads: int,
        dropout: float,
        attention: bool,
        context_filters: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.position = nn.Parameter(0.01 * torch.randn(filters, height, width))
        self.proj_in = Convolution(channels, filters, kernel=3)
        self.blocks = nn.ModuleList(Block(filters, heads, dropout, attention, context_filters) for _ in range(blocks))
        self.proj_out = Convolution(filters, outputs, kernel=3, init_scale=0.1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.proj_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x, self.position, context)
        return self.proj_out(x)
