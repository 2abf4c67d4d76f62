"""Plots as PNG files, drawn by matplotlib's Agg canvas with its own defaults, without the user's configuration.

Importing this module takes a second, since it loads matplotlib: import it inside `flowpp.decoration.decoration`.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowpp.durable import replace_file
from flowpp.environment import PLOTTING, without

# An import of matplotlib raises if MPLBACKEND names a backend that is not installed, or if MATPLOTLIBRC names a file
# that is not text: a process started from a notebook inherits both.
with without(PLOTTING), warnings.catch_warnings(action="ignore"):
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from flowpp.likelihood import Likelihood


@contextmanager
def own_style(**changes: Any) -> Iterator[None]:
    """Sets matplotlib's own defaults and `changes` of them, in place of a matplotlibrc or a style of the user."""
    own: Any = {name: value for name, value in mpl.rcParamsDefault.items() if name != "backend"}  # each canvas is named
    with warnings.catch_warnings(action="ignore"), mpl.rc_context(own | changes):
        yield


@own_style()
def write_training_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits/dim over steps, of the lines of a metrics.jsonl: training, and validation with its standard error."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="bits/dim")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    training = [(row["step"], row["train_bits_per_dim"]) for row in rows if "train_bits_per_dim" in row]
    validation = [
        (row["step"], row["validation_bits_per_dim"], row.get("validation_standard_error", 0.0))
        for row in rows
        if "validation_bits_per_dim" in row
    ]
    if training:
        axes.plot(*zip(*training, strict=True), color="0.6", linewidth=1, label="training")
    if validation:
        steps, means, errors = zip(*validation, strict=True)
        axes.errorbar(steps, means, errors, color="C0", marker=".", capsize=2, label="validation (EMA weights)")
        axes.axhline(min(means), color="C0", linewidth=0.5, linestyle=":")
        axes.set_title(f"validation {min(means):.3f} bits/dim at best", fontsize="medium")
    if training or validation:
        axes.legend()
        axes.set_ylim(*_visible([value for _, value, *_ in [*training, *validation]]))
    _write(figure, path)


@own_style()
def write_histogram(likelihood: "Likelihood", path: Path) -> None:
    """Images over bits/dim, with the mean."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="bits/dim", ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.hist(likelihood.bits_per_dim, bins="auto", color="C0")
    error = "" if likelihood.standard_error is None else f" ± {likelihood.standard_error:.3f}"
    axes.axvline(likelihood.mean, color="C1", label=f"mean {likelihood.mean:.3f}{error}")
    axes.legend()
    _write(figure, path)


@own_style()
def write_maps(images: np.ndarray, maps: np.ndarray, names: Sequence[str], label: str, path: Path) -> None:
    """Images, uint8 [N, H, W, C], each above its map, float [N, H, W]; the first 16."""
    n = min(len(images), 16)
    columns = min(n, 8)
    rows = 2 * -(-n // columns)
    figure = Figure(figsize=(1.3 * columns + 1.2, 1.45 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    low, high = float(maps[:n].min()), float(maps[:n].max())
    for axes in grid.flat:
        axes.set_axis_off()
    for index in range(n):
        row, column = 2 * (index // columns), index % columns
        grid[row, column].imshow(images[index].squeeze(), cmap="gray")
        name = names[index][-16:].encode("ascii", "replace").decode()  # the font lacks most scripts
        grid[row, column].set_title(name, fontsize=6, parse_math=False)
        grid[row + 1, column].imshow(maps[index], vmin=low, vmax=high, cmap="viridis")
    scale = ScalarMappable(Normalize(low, high), cmap="viridis")
    figure.colorbar(scale, ax=grid, shrink=0.6, label=label)
    _write(figure, path)


def _visible(values: list[float]) -> tuple[float, float]:
    """Limits that show the bulk of a curve: its first steps may be far above the rest."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[int(0.95 * (len(ordered) - 1))]
    margin = 0.1 * (high - low) or 0.1
    return low - margin, high + margin


def _write(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    replace_file(path, content.getvalue())
