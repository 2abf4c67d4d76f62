"""The authors' algorithm in plain eager PyTorch, on the weights of a `FlowPP`: what `make bench` measures ours against.

A rendering of how the authors' PyTorch port computes: halves as tuples in contiguous memory, concat_elu as
concatenation, attention by an explicit softmax over all positions, log CDF and log density of the mixture one after
the other, its inverse by bisection of the log CDF with a look at the largest error each time, everything kept by
autograd. It has the same values as ours but for rounding (`tests/benchmarks/test_baseline.py`), and their weaknesses:
the upper tail of the CDF is lost. Mixture couplings without weight normalization only.

Axes: B batch, C channels of a half, F filters, H height, W width, K mixture components.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowpp.conditioner import Block, Conditioner, Convolution, GatedAttention, GatedConvolution
from flowpp.coupling import MixtureCoupling
from flowpp.dequantization import VariationalDequantizer
from flowpp.model import FlowPP
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

MOST_BISECTIONS, TOLERANCE, BOUNDS_SCALE = 60, 1e-8, 100.0

Halves = tuple[Tensor, Tensor]


def log_prob(model: FlowPP, images: Tensor, noise: Tensor) -> Tensor:
    """The variational bound on log P in nats, [B], of uint8 images [B, C, H, W] under normal noise of their shape."""
    x = images.to(noise.dtype)
    assert isinstance(model.dequantizer, VariationalDequantizer)
    assert isinstance(model.dequantizer.flow, Compose)
    u, log_det_u = _compose(model.dequantizer.flow, noise, _context(model.dequantizer, x), inverse=False)
    z, log_det = _compose(model.flow, x + u, None, inverse=False)
    return _normal(z) + log_det + log_det_u - _normal(noise)


@torch.no_grad()
def decode(model: FlowPP, latents: Tensor) -> Tensor:
    """The images v = f^-1(z), float [B, C, H, W], of latents [B, *latent_shape]."""
    return _compose(model.flow, latents, None, inverse=True)[0]


def _normal(z: Tensor) -> Tensor:
    return (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def _compose(flow: Compose, x: Any, context: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Our split is one tensor with its halves stacked; theirs is a tuple, from the split to the merge."""
    transforms: list[Any] = list(flow.transforms)
    total = x.new_zeros(len(x))
    for transform in reversed(transforms) if inverse else transforms:
        undone = isinstance(transform, Inverse)
        within = transform.transform if isinstance(transform, Inverse) else transform
        backwards = inverse != undone
        if isinstance(within, Columns | Squeeze):
            x = _merged(x) if isinstance(x, tuple) and isinstance(within, Squeeze) else x
            x = _permute(within, x, backwards)
            continue
        if isinstance(within, Normalization | Pointwise | MixtureCoupling | Flip) and not isinstance(x, tuple):
            x = x.chunk(2, dim=1)
        x, log_det = _transform(within, x, context, backwards)
        if log_det is not None:
            total = total + log_det
    return _merged(x), total


def _merged(x: Any) -> Tensor:
    return torch.cat(x, dim=1) if isinstance(x, tuple) else x


def _permute(transform: Columns | Squeeze, x: Any, backwards: bool) -> Any:
    if isinstance(transform, Squeeze):
        b, c, h, w = x.shape
        if backwards:
            return x.reshape(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)
        return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
    if backwards:
        first, second = x if isinstance(x, tuple) else x.chunk(2, dim=1)
        b, c, h, w = first.shape
        return torch.stack((first, second), dim=4).reshape(b, c, h, 2 * w)
    x = _merged(x)
    b, c, h, w = x.shape
    return x.reshape(b, c, h, w // 2, 2).unbind(dim=4)


def _transform(transform: Transform, x: Any, context: Tensor | None, inverse: bool) -> tuple[Any, Tensor | None]:
    match transform:
        case Flip():
            return (x[1], x[0]), None
        case Normalization():
            return _normalization(transform, x, inverse)
        case Pointwise():
            return _pointwise(transform, x, inverse)
        case MixtureCoupling():
            return _coupling(transform, x, context, inverse)
        case ImageLogit():
            return _image_logit(transform, x, inverse)
        case Sigmoid():
            assert not inverse
            return torch.sigmoid(x), _sum(-functional.softplus(x) - functional.softplus(-x))
    raise NotImplementedError(type(transform).__name__)


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


def _image_logit(transform: ImageLogit, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    scale = 0.9 / transform.levels
    if inverse:
        y = torch.sigmoid(x)
        return (y - 0.05) / scale, _sum(torch.log(y) + torch.log1p(-y) - math.log(scale))
    y = x * scale + 0.05
    y = -torch.log(1 / y - 1)
    return y, _sum(math.log(scale) + functional.softplus(y) + functional.softplus(-y))


def _normalization(transform: Normalization, x: Halves, inverse: bool) -> tuple[Halves, Tensor]:
    outputs, total = [], x[0].new_zeros(len(x[0]))
    for half, g, b in zip(x, transform.gain.chunk(2), transform.bias.chunk(2), strict=True):
        g = g.clamp(min=1e-10)
        outputs.append((half - b) / g if inverse else half * g + b)
        log_det = (-g.log() if inverse else g.log())[None].repeat(len(half), 1, 1, 1)
        total = total + _sum(log_det)
    return (outputs[0], outputs[1]), total


def _pointwise(transform: Pointwise, x: Halves, inverse: bool) -> tuple[Halves, Tensor]:
    outputs, total = [], x[0].new_zeros(len(x[0]))
    for half, weight in zip(x, transform.weight, strict=True):
        b, c, h, w = half.shape
        flat = half.permute(0, 2, 3, 1).reshape(b * h * w, c)
        flat = flat.matmul(torch.inverse(weight) if inverse else weight)
        outputs.append(flat.reshape(b, h, w, c).permute(0, 3, 1, 2))
        log_det = torch.slogdet(weight.double())[1].to(half.dtype)
        total = total + (-1 if inverse else 1) * h * w * log_det * half.new_ones(b)
    return (outputs[0], outputs[1]), total


def _coupling(coupling: MixtureCoupling, x: Halves, context: Tensor | None, inverse: bool) -> tuple[Halves, Tensor]:
    x1, x2 = x
    b, c, h, w = x1.shape
    assert isinstance(coupling.conditioner, Conditioner)
    parameters = _conditioner(coupling.conditioner, x1, context)
    parameters = parameters.reshape(b, c, 2 + 3 * coupling.components, h, w).permute(0, 2, 1, 3, 4)
    log_scale, shift = torch.tanh(parameters[:, 0]), parameters[:, 1]
    logits, means, log_scales = torch.chunk(parameters[:, 2:], 3, dim=1)  # [B, K, C, H, W] each
    mixture = logits, means, log_scales.clamp(min=-7)
    if inverse:
        y = torch.sigmoid((x2 - shift) * torch.exp(-log_scale))
        log_det = torch.log(y) + torch.log1p(-y) - log_scale
        found = bisect(torch.log(y), *mixture)
        return (x1, found), _sum(log_det - _log_density(found, *mixture))
    y = torch.exp(_log_cdf(x2, *mixture))
    log_det = _log_density(x2, *mixture) - torch.log(y) - torch.log1p(-y) + log_scale
    return (x1, -torch.log(1 / y - 1) * torch.exp(log_scale) + shift), _sum(log_det)


def _log_density(x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    z = (x.unsqueeze(1) - means) * torch.exp(-log_scales)
    terms = z - log_scales - 2 * functional.softplus(z)
    return torch.logsumexp(functional.log_softmax(logits, dim=1) + terms, dim=1)


def _log_cdf(x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    terms = functional.logsigmoid((x.unsqueeze(1) - means) * torch.exp(-log_scales))
    return torch.logsumexp(functional.log_softmax(logits, dim=1) + terms, dim=1)


@torch.no_grad()
def bisect(log_y: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """x with log F(x) = log_y, of its shape; the parameters have K along dimension 1."""
    x = torch.zeros_like(log_y)
    reach = BOUNDS_SCALE * log_scales.exp().sum(dim=1, keepdim=True)
    low, high = (means - reach).amin(dim=1), (means + reach).amax(dim=1)
    for _ in range(MOST_BISECTIONS):
        reached = _log_cdf(x, logits, means, log_scales)
        above = reached > log_y
        following = torch.where(above, (x + low) / 2, (x + high) / 2)
        if (reached - log_y).abs().max().item() < TOLERANCE:
            return following
        low, high = torch.where(above, low, x), torch.where(above, x, high)
        x = following
    return x


def _context(dequantizer: VariationalDequantizer, x: Tensor) -> Tensor:
    network = dequantizer.context
    b, c, h, w = x.shape
    a = torch.cat((x / network.levels - 0.5).reshape(b, c, h, w // 2, 2).unbind(dim=4), dim=1)
    a = _convolve(network.proj_in, a)
    for block in network.blocks:
        assert isinstance(block, Block)
        a = _gated_convolution(block.convolution, a, None)
    return a


def _conditioner(network: Conditioner, x: Tensor, context: Tensor | None) -> Tensor:
    x = _convolve(network.proj_in, x)
    for block in network.blocks:
        assert isinstance(block, Block)
        assert block.attention is not None
        x = _layer_norm(block.norm1, _gated_convolution(block.convolution, x, context))
        x = _layer_norm(block.norm2, _gated_attention(block.attention, x, network.position))
    return _convolve(network.proj_out, x)


def _convolve(layer: Convolution, x: Tensor) -> Tensor:
    if layer.weight.shape[-1] == 1:
        b, c, h, w = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(b * h * w, c)
        flat = functional.linear(flat, layer.weight.flatten(1), layer.bias)
        return flat.reshape(b, h, w, -1).permute(0, 3, 1, 2)
    return functional.conv2d(x, layer.weight, layer.bias, padding=1)


def _concat_elu(x: Tensor) -> Tensor:
    return functional.elu(torch.cat((x, -x), dim=1))


def _gate(x: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=1)
    return a * torch.sigmoid(b)


def _layer_norm(norm: Any, x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    return functional.layer_norm(x, (x.shape[-1],), norm.gain, norm.bias).permute(0, 3, 1, 2)


def _gated_convolution(layer: GatedConvolution, x: Tensor, context: Tensor | None) -> Tensor:
    h = _convolve(layer.proj_in, _concat_elu(x))
    if layer.proj_context is not None:
        assert context is not None
        h = h + _convolve(layer.proj_context, _concat_elu(context))
    h = functional.dropout(_concat_elu(h), layer.proj_gate.dropout.p, layer.training)
    return x + _gate(_convolve(layer.proj_gate, h))


def _gated_attention(layer: GatedAttention, x: Tensor, position: Tensor) -> Tensor:
    b, f, h, w = x.shape
    c = _convolve(layer.proj_in, x + position[None])
    c = c.reshape(b, 3, layer.heads, f // layer.heads, h * w).permute(1, 0, 2, 4, 3)
    q, k, v = c.unbind(dim=0)
    weights = functional.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(f // layer.heads), dim=3)
    a = torch.matmul(weights, v).permute(0, 1, 3, 2).reshape(b, f, h, w)
    return x + _gate(_convolve(layer.proj_gate, functional.dropout(a, layer.dropout.p, layer.training)))
