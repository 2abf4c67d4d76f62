"""The authors' models written a second time, for the tests: channels last, one variable a name, nothing shared
with flowpp. Variables are created when first asked for, as TensorFlow does, so that it also says what a file holds.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Variables:
    """Random values by name; `scope` and `unique` build names."""

    def __init__(self, seed: int, suffix: str) -> None:
        self.values: dict[str, np.ndarray] = {}
        self.uses: Counter[str] = Counter()
        self._generator = np.random.default_rng(seed)
        self._suffix = suffix

    def __call__(self, name: str, *shape: int) -> Tensor:
        name += self._suffix
        self.uses[name] += 1
        if name not in self.values:
            leaf = name.removesuffix(self._suffix).rsplit("/", 1)[-1]
            noise = self._generator.standard_normal(shape)
            if leaf in ("g", "W0", "W1"):  # gains near 1, matrices near the identity
                value = 1 + 0.1 * noise if leaf == "g" else np.eye(shape[0]) + 0.05 * noise
            else:
                value = 0.05 * noise
            self.values[name] = value.astype(np.float32)
        assert self.values[name].shape == shape
        return torch.from_numpy(self.values[name]).double()


class Authors:
    """One of the authors' models: `log_weight(x, eps)`, nats, with x [B, H, W, 3] and eps the dequantizer's noise."""

    def __init__(self, kind: str, seed: int) -> None:
        self.cifar, self.weight_norm = kind == "cifar10", kind == "imagenet32"
        self.small = kind == "imagenet64"
        self.v = Variables(seed, "" if self.cifar else "/ExponentialMovingAverage")
        self.filters = 128 if self.weight_norm else 96
        self.blocks = {"cifar10": 10, "imagenet32": 20, "imagenet64": 16}[kind]
        self.dequant_blocks = {"cifar10": 2, "imagenet32": 8, "imagenet64": 5}[kind]
        self.components = 4 if self.small else 32
        self.kind = kind

    def log_weight(self, x: Tensor, eps: Tensor) -> Tensor:
        self._counters: Counter[str] = Counter()
        context = self._context(x / 256.0 - 0.5)
        log_q = normal(eps)
        stages = ["check4", "check4"] if self.weight_norm else ["check4"]
        h, log_det = self._flow(eps, stages, context)
        u = torch.sigmoid(h)
        log_q = log_q - log_det + (F.softplus(h) + F.softplus(-h)).flatten(1).sum(1)
        y = 0.05 + 0.9 / 256 * (x + u)
        y = torch.log(y) - torch.log1p(-y)
        log_det = (np.log(0.9 / 256) + F.softplus(y) + F.softplus(-y)).flatten(1).sum(1)
        z, more = self._flow(y, MAIN[self.kind], None)
        return normal(z) + log_det + more - log_q

    def _flow(self, x: Tensor, stages: list[str], context: Tensor | None) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=x.dtype)
        for stage in stages:
            if stage == "s2d":
                b, h, w, c = x.shape
                x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)
                continue
            b, h, w, c = x.shape
            columns = stage.startswith("check")
            halves = x.reshape(b, h, w // 2, 2, c).unbind(3) if columns else x.split(c // 2, dim=3)
            one, two = halves
            for _ in range(int(stage[-1])):
                one, two, log_det = self._coupled(one, two, context)
                one, two = two, one
                total = total + log_det
            x = torch.stack((one, two), 3).reshape(b, h, w, c) if columns else torch.cat((one, two), 3)
        return x, total

    def _coupled(self, one: Tensor, two: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        norm, log_det = self._unique("Norm"), torch.zeros(len(one), dtype=one.dtype)
        normalized = []
        for i, half in enumerate((one, two)):
            g, b = (self.v(f"{norm}/norm{i}/{name}", *half.shape[1:]) for name in ("g", "b"))
            normalized.append(half * g.clamp(min=1e-10) + b)
            log_det = log_det + g.clamp(min=1e-10).log().sum()
        one, two = normalized
        if self.cifar:
            pointwise, c = self._unique("Pointwise"), one.shape[3]
            matrices = [self.v(f"{pointwise}/W{i}", c, c) for i in (0, 1)]
            one, two = one @ matrices[0], two @ matrices[1]
            places = one.shape[1] * one.shape[2]
            log_det = log_det + places * sum(torch.linalg.slogdet(matrix).logabsdet for matrix in matrices)
        h = self._conditioner(one, context)
        b, height, width, c = two.shape
        h = h.reshape(b, height, width, c, 2 + 3 * self.components)
        a, shift = torch.tanh(h[..., 0]), h[..., 1]
        logits, means, log_scales = h[..., 2:].split(self.components, dim=4)
        log_scales = log_scales.clamp(min=-7)
        z = (two[..., None] - means) * torch.exp(-log_scales)
        weights = logits.log_softmax(4)
        below = torch.logsumexp(weights + F.logsigmoid(z), 4)
        above = torch.logsumexp(weights + F.logsigmoid(-z), 4)
        density = torch.logsumexp(weights + z - log_scales - 2 * F.softplus(z), 4)
        out = (below - above) * a.exp() + shift
        terms = density - below - above + a
        return one, out, log_det + terms.flatten(1).sum(1)

    def _conditioner(self, x: Tensor, context: Tensor | None) -> Tensor:
        attention = not (self.small and context is not None)
        scope = self._unique("MixLogisticAttnCoupling" if attention else "MixLogisticCoupling")
        first, last = ("proj_in", "proj_out") if self.cifar else ("c1", "c2")
        outputs = x.shape[3] * (2 + 3 * self.components)
        position = self.v(f"{scope}/pos_emb", x.shape[1], x.shape[2], self.filters)
        x = self._conv(f"{scope}/{first}", x, self.filters)
        for i in range(self.blocks if context is None else self.dequant_blocks):
            block = f"{scope}/block{i}"
            x = self._gated_conv(f"{block}/conv", x, context, self._nin)
            x = self._layer_norm(f"{block}/ln1", x)
            if attention:
                x = self._gated_attention(f"{block}/attn", x, position)
                x = self._layer_norm(f"{block}/ln2", x)
        return self._conv(f"{scope}/{last}", x if self.cifar else concat_elu(x), outputs)

    def _context(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = torch.cat(x.reshape(b, h, w // 2, 2, c).unbind(3), 3)
        x = self._conv("context_proc/proj", x, 32)
        position = self.v("context_proc/pos_emb_dq", h, w // 2, 32) if self.weight_norm else None
        for i in range({"cifar10": 3, "imagenet32": 8, "imagenet64": 5}[self.kind]):
            x = self._gated_conv(f"context_proc/c{i}", x, None, self._conv)
            if not self.cifar:
                x = self._layer_norm(f"context_proc/dqln{i}", x)
            if position is not None:
                x = self._gated_attention(f"context_proc/dqattn{i}", x, position)
                x = self._layer_norm(f"context_proc/ln{i}", x)
        return x

    def _gated_conv(self, scope: str, x: Tensor, context: Tensor | None, gate: Callable[..., Tensor]) -> Tensor:
        h = self._conv(f"{scope}/c1", concat_elu(x), x.shape[3])
        if context is not None:
            h = h + self._nin(f"{scope}/a_proj", concat_elu(context), x.shape[3])
        one, two = gate(f"{scope}/c2", concat_elu(h), 2 * x.shape[3]).chunk(2, dim=3)
        return x + one * torch.sigmoid(two)

    def _gated_attention(self, scope: str, x: Tensor, position: Tensor) -> Tensor:
        b, h, w, c = x.shape
        qkv = self._nin(f"{scope}/proj1", x + position, 3 * c).reshape(b, h * w, 3, 4, c // 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = ((q @ k.transpose(2, 3)) / (c // 4) ** 0.5).softmax(3) @ v
        one, two = self._nin(f"{scope}/proj2", attended.transpose(1, 2).reshape(b, h, w, c), 2 * c).chunk(2, dim=3)
        return x + one * torch.sigmoid(two)

    def _layer_norm(self, scope: str, x: Tensor) -> Tensor:
        shape = (1, 1, 1, x.shape[3]) if self.cifar else (x.shape[3],)
        centred = x - x.mean(3, keepdim=True)
        normal = centred / (centred.square().mean(3, keepdim=True) + 1e-5).sqrt()
        return normal * self.v(f"{scope}/g", *shape) + self.v(f"{scope}/b", *shape)

    def _conv(self, scope: str, x: Tensor, outputs: int) -> Tensor:
        weight = self._weight(scope, 3, 3, x.shape[3], outputs)
        y = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), padding=1).permute(0, 2, 3, 1)
        return y + self.v(f"{scope}/b", outputs)

    def _nin(self, scope: str, x: Tensor, outputs: int) -> Tensor:
        return x @ self._weight(scope, x.shape[3], outputs) + self.v(f"{scope}/b", outputs)

    def _weight(self, scope: str, *shape: int) -> Tensor:
        if not self.weight_norm:
            return self.v(f"{scope}/W", *shape)
        direction = self.v(f"{scope}/V", *shape)
        return self.v(f"{scope}/g", shape[-1]) * direction / direction.flatten(0, -2).norm(dim=0)

    def _unique(self, kind: str) -> str:
        self._counters[kind] += 1
        return kind if self._counters[kind] == 1 else f"{kind}_{self._counters[kind] - 1}"


MAIN = {
    "cifar10": ["check4", "s2d", "chan2", "check3"],
    "imagenet32": ["check4", "check3", "s2d", "chan3", "check3"],
    "imagenet64": ["s2d", "check4", "s2d", "chan2", "check2", "s2d", "chan2", "check2"],
}


def concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat((x, -x), 3))


def normal(x: Tensor) -> Tensor:
    return (-0.5 * x.square() - 0.5 * np.log(2 * np.pi)).flatten(1).sum(1)
