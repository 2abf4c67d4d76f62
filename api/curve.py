"""A training curve in characters."""

import math
from collections.abc import Sequence

from rich.text import Text

Points = Sequence[tuple[float, float]]
"""(step, bits/dim)."""

MOST_POINTS = 400  # more than braille dots fit side by side


def draw(train: Points, validation: Points, width: int, height: int) -> Text:
    """Both over the steps, in so many columns and lines: train as a line, validation as dots."""
    import plotext  # here, as only who watches needs it

    top = _top([bits for _, bits in (*train, *validation)])
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, height)
    # neither limits nor dense lines: together they abort plotext 6.1
    for points, marker in (
        (train, plotext.marker("braille", "cyan")),
        (validation, plotext.marker("dot", "yellow")),
    ):
        if points:
            shown = _thinned(points)
            signal = figure.signal([step for step, _ in shown], [min(top, bits) for _, bits in shown], marker=marker)
            figure.draw(signal.lines() if points is train else signal)
    ticks = _ticks([step for step, _ in (*train, *validation)], count=max(2, width // 16))
    figure.ruler("x").ticks(ticks, [f"{tick:,}" for tick in ticks])
    return Text.from_ansi(figure.build().string().rstrip("\n"), no_wrap=True, overflow="crop")


def _top(bits: Sequence[float]) -> float:
    """What is above it, mostly the first steps, would flatten all the rest."""
    ordered = sorted(bits)
    low, most = ordered[0], ordered[len(ordered) * 3 // 4]
    return low + 4 * (most - low) if most > low else ordered[-1]


def _thinned(points: Points) -> Points:
    every = math.ceil(len(points) / MOST_POINTS)
    return [*points[:-1:every], points[-1]]


def _ticks(steps: Sequence[float], count: int) -> list[int]:
    first, last = int(min(steps)), int(max(steps))
    return sorted({first + round(index * (last - first) / (count - 1)) for index in range(count)})
