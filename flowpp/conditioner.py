"""The networks inside the couplings: gated convolutions and gated attention, layer norm after each.

Axes: B batch, F filters, H height, W width; feature maps are [B, F, H, W] in channels-last memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, glu, layer_norm, scaled_dot_product_attention

from flowpp import fused
from flowpp.config import HEAD_SIZES, Attention
from flowpp.dropout import Dropout
from flowpp.initialization import DataDependent, inverse_deviation, normal


def concat_elu(x: Tensor) -> Tensor:
    """elu of x and -x, concatenated: [B, F, H, W] -> [B, 2F, H, W]."""
    return elu(torch.cat([x, -x], dim=1))


@dataclass(frozen=True)
class Layers:
    """What the layers of a network have in common.

    `attention` is softmax attention, the parameter-matched maximum (ablation) or none, with its layer norm;
    `norm` is false where there is no layer norm at all.
    """

    filters: int
    heads: int
    dropout: float
    attention: Attention
    weight_norm: bool
    norm: bool = True

    @property
    def kind(self) -> dict[str, bool]:
        """Of their convolutions."""
        return {"weight_norm": self.weight_norm}


class Precision:
    """Of a network's inner layers: that of its input, or bfloat16 where so set."""

    bfloat16 = False

    def reduced(self, x: Tensor) -> torch.autocast:
        """Within it, convolutions and attention on x's device compute in bfloat16, if that is set."""
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16)


class Convolution(DataDependent, fused.Fusing):
    """kernel x kernel convolution, same padding.

    Weight ~ N(0, 0.05^2), bias 0; data-dependent initialization scales both so that each output channel has
    mean 0 and standard deviation `init_scale` over the batch and positions (authors' conv2d, nin). With weight
    normalization (Salimans & Kingma, 2016) the filter of an output channel is gain * weight / |weight|.
    """

    def __init__(
        self, channels: int, filters: int, kernel: int, init_scale: float = 1.0, *, weight_norm: bool = False
    ) -> None:
        super().__init__()
        weight = normal(0.05, filters, channels, kernel, kernel)
        # in the memory format of what it meets, or each pass would copy it
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.gain = nn.Parameter(torch.ones(filters)) if weight_norm else None
        self.bias = nn.Parameter(torch.zeros(filters))
        self.init_scale = init_scale

    def initialize(self, x: Tensor) -> None:
        self.bias.zero_()
        variance, mean = torch.var_mean(self._convolve(x), dim=(0, 2, 3), correction=0)
        scale = self.init_scale * inverse_deviation(variance, 1e-10)
        if self.gain is None:
            self.weight.mul_(scale[:, None, None, None])
        else:
            self.gain.mul_(scale)
        self.bias.copy_(-mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        self.initialize_from(x)
        return self._convolve(x)

    def filter(self) -> Tensor:
        """The weight [filters, channels, k, k] that it convolves with."""
        if self.gain is None:
            return self.weight
        return self.weight * (self.gain / self.weight.flatten(1).norm(dim=1))[:, None, None, None]

    def _convolve(self, x: Tensor) -> Tensor:
        convolve = fused.convolution if self.fuses(x) else fused.convolve
        return convolve(x, self.filter(), self.bias)


class EluConvolution(Convolution):
    """conv(dropout(concat_elu(x))): [B, F, H, W] -> [B, filters, H, W], of 2F channels within."""

    def __init__(self, channels: int, filters: int, kernel: int, *, dropout: float = 0.0, **kind: Any) -> None:
        super().__init__(2 * channels, filters, kernel, **kind)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses(x) and not self._initializing:
            return fused.elu_convolution(x, self.filter(), self.bias, self.dropout.draw())
        return super().forward(self.dropout(concat_elu(x)))


class GateNorm(nn.Module, fused.Fusing):
    """x + gate(gates), of gates [B, 2F, H, W], normalized over the channels at each position where `norm` says so.

    gate(h) = first half of h's channels * sigmoid(second half). The layer norm has eps 1e-5, a gain and a bias a
    channel.
    """

    def __init__(self, filters: int, *, norm: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(filters)) if norm else None
        self.bias = nn.Parameter(torch.zeros(filters)) if norm else None

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        if self.fuses(x):
            return fused.gate_norm(x, gates, self.gain, self.bias)
        x = x + glu(gates, dim=1)
        if self.gain is None:
            return x
        x = x.permute(0, 2, 3, 1)
        return layer_norm(x, x.shape[-1:], self.gain, self.bias, eps=1e-5).permute(0, 3, 1, 2)


class GatedConvolution(nn.Module):
    """The gates [B, 2F, H, W] conv(dropout(concat_elu(conv3x3(concat_elu(x)) + conv1x1(concat_elu(context)))))."""

    def __init__(self, layers: Layers, context_filters: int, gate_kernel: int) -> None:
        super().__init__()
        filters, kind = layers.filters, layers.kind
        self.proj_in = EluConvolution(filters, filters, kernel=3, **kind)
        self.proj_context = EluConvolution(context_filters, filters, kernel=1, **kind) if context_filters else None
        self.proj_gate = EluConvolution(
            filters, 2 * filters, kernel=gate_kernel, init_scale=0.1, dropout=layers.dropout, **kind
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.proj_in(x)
        if self.proj_context is not None:
            assert context is not None
            h = h + self.proj_context(context)
        return self.proj_gate(h)


class GatedAttention(nn.Module, fused.Fusing):
    """The gates [B, 2F, H, W] conv1x1(dropout(attention(conv1x1(x + position)))), over all positions, without mask.

    qkv channels are ordered (q, k, v), then heads, then features. In the ablation the 3F channels are read as
    (F, 3), filter-major, and their maximum over the 3 takes attention's place.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        filters = layers.filters
        self.proj_in = Convolution(filters, 3 * filters, kernel=1, **layers.kind)
        self.dropout = Dropout(layers.dropout)
        self.proj_gate = Convolution(filters, 2 * filters, kernel=1, init_scale=0.1, **layers.kind)
        self.heads = layers.heads
        self.softmax = layers.attention == "softmax"
        self.has_kernel = self.softmax and filters // self.heads in HEAD_SIZES

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        h = self.proj_in(x + position)
        if self.has_kernel and self.fuses(x):
            return self.proj_gate(fused.attention(h, self.heads, self.dropout.draw()))
        h = self._attend(h) if self.softmax else h.unflatten(1, (-1, 3)).amax(2)
        return self.proj_gate(self.dropout(h))

    def _attend(self, h: Tensor) -> Tensor:
        height = h.shape[2]
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # [B, HW, 3F]
        q, k, v = h.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, HW, F/heads] each
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, F]
        return h.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x plus a gated convolution, normalized, plus gated attention, normalized; of them those that `layers` has."""

    def __init__(self, layers: Layers, *, context_filters: int = 0, gate_kernel: int = 1) -> None:
        super().__init__()
        self.convolution = GatedConvolution(layers, context_filters, gate_kernel)
        self.norm1 = GateNorm(layers.filters, norm=layers.norm)
        self.attention = GatedAttention(layers) if layers.attention != "none" else None
        self.norm2 = GateNorm(layers.filters, norm=True) if layers.attention != "none" else None

    def forward(self, x: Tensor, position: Tensor | None, context: Tensor | None = None) -> Tensor:
        x = self.norm1(x, self.convolution(x, context))
        if self.attention is not None and self.norm2 is not None:
            assert position is not None
            x = self.norm2(x, self.attention(x, position))
        return x


class Conditioner(nn.Module):
    """[B, C, H, W] (and a context [B, context_filters, H, W]) -> [B, outputs, H, W].

    A 3x3 convolution, `blocks` blocks that share one learned position embedding (F, H, W) ~ N(0, 0.01^2), and
    a 3x3 convolution that starts small, with a concat_elu before it where `output_elu` says so.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int,
        layers: Layers,
        *,
        blocks: int,
        output_elu: bool,
        context_filters: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        filters, weight_norm = layers.filters, layers.weight_norm
        # Without attention nothing reads it; the authors' models have it nevertheless, and their counts it.
        self.position = nn.Parameter(normal(0.01, filters, height, width), layers.attention != "none")
        self.proj_in = Convolution(channels, filters, kernel=3, weight_norm=weight_norm)
        self.blocks = nn.ModuleList(Block(layers, context_filters=context_filters) for _ in range(blocks))
        self.precision = Precision()
        last = EluConvolution if output_elu else Convolution
        self.proj_out = last(filters, outputs, kernel=3, init_scale=0.1, weight_norm=weight_norm)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        with self.precision.reduced(x):
            h = self.proj_in(x.contiguous(memory_format=torch.channels_last))
            for block in self.blocks:
                h = block(h, self.position, context)
        return self.proj_out(h.to(x.dtype))
