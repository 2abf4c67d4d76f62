"""Flow++: discrete images to log-likelihoods and latents, and back.

The architecture is the list that `architecture` builds; it reads like the tables of the paper's appendix.
Axes: B batch, C channels, H height, W width. Images are uint8 with values in 0..2**bits-1.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

from flowpp.arguments import MOST_SEED, check_finite, form_of, real, whole
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
from flowpp.devices import resolve_device
from flowpp.dropout import Dropout, dropping
from flowpp.fused import Fusing
from flowpp.initialization import check_images, initializing
from flowpp.precision import without_autocast
from flowpp.presets import find_preset
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

_BOTH = "give noise or a generator to draw it with, not both"


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


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def in_own_precision(
    method: Callable[Concatenate["FlowPP", Arguments], Result],
) -> Callable[Concatenate["FlowPP", Arguments], Result]:
    """`method` of a model without the autocast that its caller may be in."""

    @wraps(method)
    def computed(model: "FlowPP", /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with without_autocast(model.parameter.device):
            return method(model, *arguments, **options)

    return computed


class FlowPP(nn.Module):
    """A Flow++ model: `FlowPP("cifar10")` is the paper's, with 31,443,440 parameters.

    Takes a `ModelConfig` or the name of a preset. Raises `ValueError` for another name. Before training, call
    `initialize` with a batch of images.

    `training_loss` is the objective of a training step, and applies dropout. All other methods are without dropout and
    do not depend on the module's mode. Each computes in the dtype of the parameters, also under `torch.autocast`, and
    raises `ValueError` for arguments that are not the model's, and for weights of a dtype other than float32 and
    float64.
    """

    checkpoint_sha256: str | None = None
    """Of the file that the weights were loaded from."""
    replays: Replays | None = None
    """Recordings of its passes, after `replay`."""

    def __init__(self, config: ModelConfig | str) -> None:
        super().__init__()
        self.config = find_preset(config).model if isinstance(config, str) else config
        if not isinstance(self.config, ModelConfig):
            raise ValueError(f"config is a {type(config).__name__}; give a ModelConfig or the name of a preset")
        self.dequantizer = _dequantizer(self.config)
        flow = architecture(self.config, self.config.flow, blocks=self.config.blocks, attention=self.config.attention)
        self.flow = Compose(ImageLogit(self.config.levels), *flow)
        for layer, dropout in enumerate(module for module in self.modules() if isinstance(module, Dropout)):
            dropout.layer = layer

    @property
    def parameter(self) -> Tensor:
        """A parameter, which has the dtype and the device that the model computes with.

        Raises `ValueError` for weights on the meta device, and in a dtype other than float32 and float64.
        """
        parameter = next(self.flow.parameters())
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the weights are {parameter.dtype}, too coarse for x + u; "
                "convert the model by model.float() to compute with it"
            )
        if parameter.is_meta:
            raise ValueError("the model is on the meta device, where weights have no values; load it onto another")
        return parameter

    @in_own_precision
    @torch.no_grad()
    def initialize(self, images: Tensor, generator: torch.Generator | None = None) -> None:
        """Data-dependent initialization of every part from uint8 images [B, C, H, W], in one pass.

        Raises `TooFewImages`, a `ValueError`, for fewer than four different images.
        """
        x, noise = self._symbols(images, generator, None)
        check_images(x)
        with initializing(self):
            self._weight_terms(x, noise)

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
        if self.replays is None or x.device.type != "cpu" or not len(x):
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

    @in_own_precision
    def training_loss(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """The objective of a training step in bits/dim: uint8 [B, C, H, W] -> float64 [B]; minimize its mean.

        It is `bits_per_dim` under dropout in the modules in training mode. The mask comes from `dropout_seed`, or else
        from torch's generator. `noise` [B, C, H, W] replaces `draw_noise`'s. The result may be NaN.
        """
        x, noise = self._symbols(images, generator, noise)
        seed = None if dropout_seed is None else whole("dropout_seed", dropout_seed, 0)
        with dropping(seed):
            prior, log_det, dequantizer = self._weight_terms(x, noise)
        return self._in_bits((prior + log_det + dequantizer).double())

    @in_own_precision
    def log_prob(
        self,
        images: Tensor,
        importance_samples: int | None = None,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Lower bound on log P(image) in nats: uint8 [B, C, H, W] -> float64 [B].

        One sample, which is the default, gives the variational bound; k samples the importance-weighted one,
        log (1/k) sum of exp(log_weight) (Burda et al., 2016). `noise` [B, C, H, W], or [k, B, C, H, W] for k samples,
        replaces `draw_noise`'s.

        Raises `ValueError` for images or noise that are not the model's, and `NotFinite` for a result that is NaN or
        infinite.
        """
        self._check_images(images)
        draws: Iterable[Tensor]
        if noise is None:
            samples = whole("importance_samples", 1 if importance_samples is None else importance_samples, 1)
            draws = (self.draw_noise(len(images), generator) for _ in range(samples))
        else:
            _check_tensor("noise", noise)
            draws = noise if noise.dim() == images.dim() + 1 else noise[None]
            samples = len(draws)
            if generator is not None:
                raise ValueError(_BOTH)
            wanted = samples if importance_samples is None else whole("importance_samples", importance_samples, 1)
            if not samples or wanted != samples:
                raise ValueError(f"importance_samples is {importance_samples}, and noise holds {samples} draws")
        total: Tensor | None = None
        for draw in draws:
            log_weight = self.log_weight(images, draw).double()
            total = log_weight if total is None else torch.logaddexp(total, log_weight)
        assert total is not None
        found = total - math.log(samples)
        check_finite("the log-likelihoods", found)
        return found

    def bits_per_dim(
        self, images: Tensor, importance_samples: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Upper bound on -log2 P(image) / D in bits/dim: uint8 [B, C, H, W] -> float64 [B]. Raises as `log_prob`."""
        return self._in_bits(self.log_prob(images, importance_samples, generator))

    def _in_bits(self, nats: Tensor) -> Tensor:
        return nats / (-math.log(2) * self.config.dimensions)

    def draw_noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """What the dequantizer makes its u from: normal (variational) or uniform noise [n, C, H, W]."""
        parameter = self.parameter
        shape = (whole("n", n, 0), *self.config.image_shape)
        _check_generator(generator, parameter.device)
        return self.dequantizer.draw_noise(shape, dtype=parameter.dtype, device=parameter.device, generator=generator)

    def log_weight(self, images: Tensor, noise: Tensor) -> Tensor:
        """log p(x + u) - log q(u|x) in nats, [B], where noise [B, C, H, W] gives u: the sum of `weight_terms`."""
        prior, log_det, dequantizer = self.weight_terms(images, noise)
        return prior + log_det + dequantizer

    @in_own_precision
    def weight_terms(self, images: Tensor, noise: Tensor) -> "WeightTerms":
        """The parts of `log_weight` for noise [B, C, H, W]. They may be NaN. Raises `ValueError` as `log_prob` does."""
        return WeightTerms(*self._pass("weight_terms", self._weight_terms, *self._symbols(images, None, noise)))

    def _weight_terms(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, log_q = self.dequantizer(x, noise)
        z, log_det = self.flow(x + u)
        return normal_log_prob(z), log_det, -log_q

    @in_own_precision
    def dequantize(self, images: Tensor, noise: Tensor) -> Tensor:
        """v = x + u, float [B, C, H, W], of uint8 images [B, C, H, W] under noise as `draw_noise` gives it."""
        x, noise = self._symbols(images, None, noise)
        v = x + self.dequantizer(x, noise)[0]
        check_finite("the dequantized values", v)
        return v

    @in_own_precision
    def log_density(self, v: Tensor) -> Tensor:
        """log p(v) in nats of continuous images, float [B, C, H, W] within [0, 2**bits] -> [B].

        The flow's own density, without dequantizer, differentiable in v: its gradient is the score of the image.
        Raises `NotFinite` for a density that is NaN or infinite, as beyond the flow's domain.
        """
        v = self._floating("v", v, self.config.image_shape)
        z, log_det = self.flow(v)
        found = normal_log_prob(z) + log_det
        check_finite("the log-densities", found)
        return found

    @in_own_precision
    @torch.no_grad()
    def bits_map(self, images: Tensor, noise: Tensor) -> Tensor:
        """Where the bits of images are spent: uint8 [B, C, H, W] -> float64 bits [B, C, H, W] a channel value.

        Each element's part of prior, log-determinant and dequantizer, brought back to its place in the image. The
        sum over an image is -log2 of its weight under this noise, that over D its bits/dim. An element can have
        less than zero: it is the gain of those that are predicted from it.
        """
        x, noise = self._symbols(images, None, noise)
        u, log_q = self.dequantizer.attribute(x, noise)
        v = x + u
        z, share = self.flow.attribute(v, torch.zeros_like(v))
        share = share + normal_terms(z)
        for stage in reversed(self.config.flow):
            if stage == "squeeze":
                share = Squeeze().restore(share)
        bits = (log_q.double() - share.double()) / math.log(2)
        check_finite("the bits", bits)
        return bits

    @in_own_precision
    @torch.no_grad()
    def encode(
        self, images: Tensor, generator: torch.Generator | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Latents [B, *config.latent_shape] of uint8 images [B, C, H, W], under one draw of the dequantizer.

        The dequantizer's u is kept in [1/16, 15/16], so that rounding cannot carry it into the next value and
        `decode` gives back the same image. Raises `NotFinite` for latents that are NaN or infinite.
        """
        (z,) = self._pass("encode", self._encode, *self._symbols(images, generator, noise))
        check_finite("the latents", z)
        return z

    def _encode(self, x: Tensor, noise: Tensor) -> tuple[Tensor]:
        u, _ = self.dequantizer(x, noise)
        z, _ = self.flow(x + u.clamp(ENCODING_MARGIN, 1 - ENCODING_MARGIN))
        return (z,)

    @in_own_precision
    def decode(self, latents: Tensor, *, continuous: bool = False) -> Tensor:
        """Images of floating-point latents [B, *config.latent_shape]: uint8 [B, C, H, W], clipped to the data cube.

        With `continuous` they are v = f^-1(z) itself, float [B, C, H, W], which has gradients: in the latents and
        in the parameters. Raises `NotFinite` for latents and for images that are NaN or infinite.
        """
        latents = self._floating("latents", latents, self.config.latent_shape)
        check_finite("the latents", latents)
        with torch.set_grad_enabled(continuous and torch.is_grad_enabled()):
            v, log_det = self._pass("decode", self.flow.inverse, latents)
        check_finite("the decoded values", v)
        check_finite("the log-determinants", log_det)  # of infinite weights when they clip v to a finite number
        return v if continuous else v.floor().clamp(0, self.config.levels - 1).to(torch.uint8)

    def sample(self, n: int, temperature: float = 1.0, seed: int | None = None, *, continuous: bool = False) -> Tensor:
        """n images as `decode` gives them, uint8 [n, C, H, W], from latents ~ N(0, temperature^2 I).

        n and the temperature are at least 0, and the seed is from 0 to 2**64 - 1. Raises as `decode`.
        """
        parameter = self.parameter
        shape = (whole("n", n, 0), *self.config.latent_shape)
        temperature = real("temperature", temperature, 0)
        generator = torch.Generator(parameter.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(whole("seed", seed, 0, MOST_SEED))
        z = torch.randn(shape, dtype=parameter.dtype, device=parameter.device, generator=generator)
        return self.decode(temperature * z, continuous=continuous)

    def save(self, directory: str | Path) -> None:
        """Writes the weights, in their dtype, and the configuration as a checkpoint directory, whole or not at all.

        Raises `FileExistsError` if `directory` exists, and `ValueError` for weights of several dtypes.
        """
        save_model(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu", *, compile: bool = True) -> Self:
        """The model of a checkpoint directory, in evaluation mode, with its EMA weights if it has them.

        The weights have the dtype of the file. `compile=False` is `fuse(False)`: plain PyTorch. Raises `BadCheckpoint`,
        a `ValueError`, for a directory that is no complete checkpoint, and `ValueError` for a device that is not there.
        """
        model = load_model(cls, Path(directory), resolve_device(device))
        model.fuse(compile)
        return model

    def _symbols(
        self, images: Tensor, generator: torch.Generator | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Images and noise, which is drawn if there is none, in the dtype and on the device of the parameters."""
        self._check_images(images)
        if noise is None:
            noise = self.draw_noise(len(images), generator)
        elif generator is not None:
            raise ValueError(_BOTH)
        else:
            _check_tensor("noise", noise)
            if noise.shape != images.shape:
                raise ValueError(f"noise of shape {tuple(noise.shape)} for images of shape {tuple(images.shape)}")
            noise = self._floating("noise", noise, self.config.image_shape)
            self.dequantizer.check_noise(noise)
        return images.to(noise), noise

    def _check_images(self, images: Tensor) -> None:
        _check_tensor("images", images)
        if images.dtype != torch.uint8:
            raise ValueError(f"images of {images.dtype}; the model takes torch.uint8")
        _check_shape("images", images, self.config.image_shape)
        if self.config.bits < 8 and images.numel() and int(images.max()) >= self.config.levels:
            raise ValueError(
                f"a channel value of {int(images.max())}; "
                f"a {self.config.bits}-bit model's are below {self.config.levels}"
            )

    def _floating(self, name: str, given: Tensor, shape: Shape) -> Tensor:
        """A floating-point argument [B, *shape] in the dtype and on the device of the parameters."""
        _check_tensor(name, given)
        if not given.is_floating_point():
            raise ValueError(f"{name} of {given.dtype}; the model takes floating-point numbers")
        _check_shape(name, given, shape)
        return given.to(self.parameter)


def _check_shape(name: str, given: Tensor, shape: Shape) -> None:
    if given.dim() != 1 + len(shape) or given.shape[1:] != shape:
        raise ValueError(
            f"{name} of {given.dtype} {tuple(given.shape)}; the model takes (B, {', '.join(map(str, shape))})"
        )


def _check_tensor(name: str, given: object) -> None:
    """Raises `ValueError` if an argument is no tensor."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is {form_of(given)}; the model takes a torch.Tensor, as torch.from_numpy makes one")
    if given.layout != torch.strided:
        raise ValueError(f"{name} is {form_of(given)} of layout {given.layout}; the model takes dense tensors")
    if given.is_meta:
        raise ValueError(f"{name} is {form_of(given)} on the meta device, where tensors have no values")


def _check_generator(generator: object, device: torch.device) -> None:
    """Raises `ValueError` if the argument cannot draw noise on the model's device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is {form_of(generator)}; the model takes a torch.Generator")
    if generator.device.type != device.type:
        raise ValueError(
            f"generator is on {generator.device}, and the model is on {device}; both must be on one device"
        )


class WeightTerms(NamedTuple):
    """log p(x + u) - log q(u|x) in parts, each [B] in nats."""

    prior: Tensor
    """log N(z; 0, I)."""
    log_det: Tensor
    """log|det dz/dv| of the main flow."""
    dequantizer: Tensor
    """-log q(u|x)."""
