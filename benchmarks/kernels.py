"""Each costly part of a model alone, by plain PyTorch and by its kernel at each level: `make bench-kernels`.

One thread and the images of a lane, as training on a machine of two cores has them. The arithmetic is what
convolutions, attention and the mixture need; the bytes are what must be read and written once, at least.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.results import table, write_section
from flowpp import levels
from flowpp.conditioner import Convolution, EluConvolution, GatedAttention, GateNorm, Layers
from flowpp.coupling import MixtureCoupling
from flowpp.native import cannot_build

REPETITIONS = 15
HEIGHT, WIDTH = 32, 16


@dataclass(frozen=True)
class Part:
    """Of a model: a module to call with inputs [B, channels, 32, 16], its arithmetic and bytes of a forward pass."""

    name: str
    module: nn.Module
    channels: tuple[int, ...]
    flops: float
    bytes: float


class _Given(nn.Module):
    """A conditioner that gives what is there."""

    def __init__(self, h: Tensor) -> None:
        super().__init__()
        self.h = nn.Parameter(h)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.h


def parts(filters: int, heads: int, components: int, images: int) -> Iterator[Part]:
    """Those of a conditioner of so many filters, and the coupling of 3 channels that follows it."""
    positions = images * HEIGHT * WIDTH
    value = 4 * positions
    layers = Layers(filters, heads, 0.0, "softmax", weight_norm=False)
    product = 2 * positions * filters
    yield Part(
        "concat_elu, 3x3 convolution",
        EluConvolution(filters, filters, 3),
        (filters,),
        product * 18 * filters,
        value * 6 * filters,
    )
    yield Part(
        "concat_elu, 1x1 convolution",
        EluConvolution(filters, 2 * filters, 1),
        (filters,),
        product * 4 * filters,
        value * 7 * filters,
    )
    yield Part(
        "gate, residual, layer norm", GateNorm(filters, norm=True), (filters, 2 * filters), 0, value * 4 * filters
    )
    attention = _Attention(layers)
    yield Part("attention", attention, (3 * filters,), 2 * product * HEIGHT * WIDTH, value * 4 * filters)
    h = torch.randn(images, 3 * (2 + 3 * components), HEIGHT, WIDTH).to(memory_format=torch.channels_last)
    yield Part(
        "mixture coupling",
        _Coupling(MixtureCoupling(_Given(h), components)),
        (6,),
        0,
        value * 3 * (2 + 3 * components + 3),
    )
    yield Part(
        "3x3 convolution alone",
        Convolution(2 * filters, filters, 3),
        (2 * filters,),
        product * 18 * filters,
        value * 3 * filters,
    )


class _Attention(GatedAttention):
    """Without the projections."""

    def __init__(self, layers: Layers) -> None:
        super().__init__(layers)
        self.proj_in = self.proj_gate = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.zeros(()))


class _Coupling(nn.Module):
    """Its result as one tensor."""

    def __init__(self, coupling: MixtureCoupling) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, x: Tensor) -> Tensor:
        y, terms = self.coupling.couple(x)
        return torch.cat([y, terms], dim=1)


def best(function: Callable[[], object]) -> float:
    """Milliseconds of the quickest of some calls."""
    function()
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def measure(part: Part, images: int) -> tuple[float, float]:
    """Milliseconds forward, without gradients, and backward, at the level of `flowpp.levels.at`."""
    inputs = [
        torch.randn(images, channels, HEIGHT, WIDTH).to(memory_format=torch.channels_last).requires_grad_()
        for channels in part.channels
    ]
    with torch.no_grad():
        forward = best(lambda: part.module(*inputs))
    out = part.module(*inputs)
    grad = torch.randn_like(out)
    wanted = [*inputs, *(parameter for parameter in part.module.parameters() if parameter.requires_grad)]
    return forward, best(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True))


def compared() -> list[str]:
    """The measured levels: the machine supports them, and the compiler can build them."""
    found = [level for level in reversed(levels.usable()) if level != levels.PLAIN]
    return [level for level in found if cannot_build(level) is None]


def header() -> list[str]:
    of_plain = ["part", "MFLOP", "MB", "plain forward ms", "backward ms"]
    return [
        *of_plain,
        *(f"{level} {way}" for level in compared() for way in ("forward", "backward")),
        "GFLOP/s",
        "GB/s",
    ]


def row(name: str, images: int, part: Part) -> list[str]:
    """Milliseconds of plain PyTorch, and how many times as fast each level is; the rates are those of the highest."""
    with levels.at(levels.PLAIN):
        plain = measure(part, images)
    faster: list[str] = []
    forward = plain[0]
    for level in compared():
        with levels.at(level):
            forward, backward = measure(part, images)
        faster += [f"{plain[0] / forward:.2f}", f"{plain[1] / backward:.2f}"]
    size = [f"{part.flops / 1e6:.0f}" if part.flops else "", f"{part.bytes / 1e6:.1f}"]
    rates = [f"{part.flops / forward / 1e6:.0f}" if part.flops else "", f"{part.bytes / forward / 1e6:.1f}"]
    return [f"{name}: {part.name}", *size, *(f"{each:.2f}" for each in plain), *faster, *rates]


def main() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    product = torch.randn(1024, 1024)
    peak = 2 * 1024**3 / best(lambda: product @ product) / 1e6
    sizes = [("cifar10", 96, 4, 32, 2), ("small", 32, 4, 8, 8)]
    cases = [
        (name, images, part)
        for name, filters, heads, components, images in sizes
        for part in parts(filters, heads, components, images)
    ]
    shown = table(header(), [row(*case) for case in track(cases, "parts")])
    torch.set_num_threads(threads)
    text = (
        f"One thread; the quickest of {REPETITIONS}; 32x16 positions. `cifar10`: 96 filters, 4 heads, K = 32, "
        "2 images; "
        "`small`, as in Speed: 32 filters, 4 heads, K = 8, 8 images. "
        f"A product of 1024x1024 matrices runs at {peak:.0f} GFLOP/s. Milliseconds are those of plain PyTorch. Columns "
        "of a level show how many times as fast its kernels are; GFLOP/s and GB/s are those of the highest level, "
        "forward.\n\n"
    )
    write_section("Kernels", "make bench-kernels", text + shown, torch.device("cpu"))
    print(shown)


if __name__ == "__main__":
    main()
