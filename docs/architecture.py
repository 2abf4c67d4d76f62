"""Draws docs/architecture.svg from the model that the code builds: `make docs`."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from flowpp.conditioner import Block, Conditioner, EluConvolution
from flowpp.coupling import Coupling
from flowpp.dequantization import ContextNetwork, VariationalDequantizer
from flowpp.environment import PLOTTING, without
from flowpp.model import FlowPP
from flowpp.plots import own_style
from flowpp.transforms import Compose, Inverse, Transform

with without(PLOTTING):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

FIGURE = Path(__file__).with_name("architecture.svg")

Box = tuple[str, str]
"""A line in bold, and one below it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--output", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    write(arguments.preset, arguments.output)


def write(preset: str, path: Path) -> None:
    """The figure of a preset, the same bytes each time."""
    with torch.device("meta"):
        model = FlowPP(preset)
    assert isinstance(model.dequantizer, VariationalDequantizer)
    dequantizer_flow = model.dequantizer.flow
    assert isinstance(dequantizer_flow, Compose)
    coupling = next(module for module in model.flow.modules() if isinstance(module, Coupling))
    columns = {
        f"dequantizer, {_count(model.dequantizer)}": [
            ("discrete image x and noise ε ~ N(0, I)", _shape(model.config.image_shape)),
            *_context(model.dequantizer.context),
            *_flow(dequantizer_flow, model.config.image_shape),
            ("u, the noise on x", "log q(u|x) = log N(ε) - log det"),
        ],
        f"main flow, {_count(model.flow)}": [
            ("v = x + u", _shape(model.config.image_shape)),
            *_flow(model.flow, model.config.image_shape),
            ("latent z", "log p(v) = log N(z) + log det"),
        ],
        f"one coupling, {_count(coupling)}": list(_coupling(coupling)),
    }
    with own_style(**{"svg.hashsalt": "flowpp", "font.size": 8}):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        for axes, (title, boxes) in zip(figure.subplots(1, 3), columns.items(), strict=True):
            _draw(axes, title, boxes)
        figure.suptitle(f"{preset}: {_count(model)}")
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def _context(context: ContextNetwork) -> Iterator[Box]:
    filters = context.proj_in.bias.numel()
    yield f"context network, {_count(context)}", f"of x: {len(context.blocks)} blocks, {filters} filters"


def _flow(flow: Compose, shape: tuple[int, int, int]) -> Iterator[Box]:
    """The transforms in their order; what is repeated between a split and its merge is one box."""
    x = torch.zeros(1, *shape, device="meta")
    group: list[Transform] = []
    for transform in flow.transforms:
        assert isinstance(transform, Transform)
        if _is_repeated(transform):
            group.append(transform)
            continue
        yield from _repeated(group, x)
        group = []
        if not isinstance(transform, Coupling):
            x = _shapes_only(transform, x)
        yield _name(transform), _shape(x.shape[1:])
    yield from _repeated(group, x)


def _is_repeated(transform: Transform) -> bool:
    return isinstance(transform, Coupling) or _name(transform) in ("normalization", "pointwise", "flip")


def _repeated(group: list[Transform], x: torch.Tensor) -> Iterator[Box]:
    if group:
        n = sum(isinstance(transform, Coupling) for transform in group)
        names = dict.fromkeys(_name(transform) for transform in group)
        yield f"{n} x [{', '.join(names)}]", f"{_shape(x.shape[1:])}; {_count(*group)}"


def _coupling(coupling: Coupling) -> Iterator[Box]:
    conditioner = coupling.conditioner
    assert isinstance(conditioner, Conditioner)
    half = (conditioner.proj_in.weight.shape[1], *conditioner.position.shape[1:])
    first = conditioner.blocks[0]
    assert isinstance(first, Block)
    yield "first half x1, which stays", _shape(half)
    yield "3x3 convolution", f"to {conditioner.proj_in.bias.numel()} filters"
    yield (
        f"{len(conditioner.blocks)} blocks, each of: gated convolution",
        "concat_elu, 3x3, concat_elu, dropout, 1x1, gate",
    )
    yield "layer norm", "over the channels of a position"
    if first.attention is not None:
        yield f"gated attention, {first.attention.heads} heads", "over all positions, with position embedding"
        yield "layer norm", ""
    last = "concat_elu, " if isinstance(conditioner.proj_out, EluConvolution) else ""
    outputs = conditioner.proj_out.bias.numel()
    yield f"{last}3x3 convolution", f"to {outputs} = {half[0]} x {outputs // half[0]} channels"
    yield "a, b; K logits, means, log-scales", "for each element of the second half"
    yield "y2 = logit F(x2) exp(tanh a) + b", "F the CDF of the mixture of logistics (eq. 16)"


def _name(transform: Transform) -> str:
    if isinstance(transform, Inverse):
        return {"Columns": "merge columns", "Squeeze": "unsqueeze"}[type(transform.transform).__name__]
    return {
        "ImageLogit": "image logit",
        "Columns": "split columns",
        "MixtureCoupling": "mixture coupling",
        "AffineCoupling": "affine coupling",
    }.get(type(transform).__name__, type(transform).__name__.lower())


def _shapes_only(transform: Transform, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = transform(x)[0]
    return y


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _count(*modules: nn.Module) -> str:
    n = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return f"{n:,} parameters"


def _draw(axes: Axes, title: str, boxes: list[Box]) -> None:
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, fontweight="bold")
    axes.set_xlim(0, 1)
    axes.set_ylim(-len(boxes) - 0.2, 0.2)
    for row, (bold, plain) in enumerate(boxes):
        text = f"{bold}\n{plain}" if plain else bold
        style = {"boxstyle": "round,pad=0.45", "facecolor": "#eef2f8", "edgecolor": "#7a8ba6"}
        axes.text(0.5, -row - 0.5, text, ha="center", va="center", bbox=style)
        if row:
            arrow = {"arrowstyle": "->", "shrinkA": 16, "shrinkB": 17}
            axes.annotate("", (0.5, -row - 0.5), (0.5, -row + 0.5), arrowprops=arrow)


if __name__ == "__main__":
    main()
