"""Checks of arguments and results at the library's edges. Needs no torch."""

import math
import operator
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST_SEED = 2**64 - 1


class NotFinite(ValueError):
    """Numbers that are NaN or infinite: the weights have diverged or are damaged, or the input was not finite."""


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The argument `name` as an int, from `least` to `most`.

    Takes ints, integers of NumPy and integer tensors of one element. Raises `ValueError` for others.
    """
    bounds = f"at least {least:,}" if most is None else f"from {least:,} to {most:,}"
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError) as error:  # a tensor of several elements raises either
        raise ValueError(f"{name} is {value!r}; it must be a whole number, {bounds}") from error
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name} is {_shown(number)}; it must be {bounds}")
    return number


def real(name: str, value: Any, least: float) -> float:
    """The argument `name` as a finite float of at least `least`.

    Takes real numbers of Python and NumPy, and arrays and tensors without axes. Raises `ValueError` for others.
    """
    try:
        number = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
        found = float(number) if isinstance(number, Real) else math.nan
    except (OverflowError, RuntimeError):  # of an int beyond all floats, of a tensor on the meta device
        found = math.nan
    if not math.isfinite(found) or found < least:
        shown = _shown(value) if isinstance(value, int) else repr(value)
        raise ValueError(f"{name} is {shown}; it must be a finite number of at least {least:g}")
    return found


def _shown(number: int) -> str:
    """The number for a message. Python refuses to print integers of some thousand digits."""
    return f"{number:,}" if abs(number) < 10**100 else f"an integer of {number.bit_length():,} bits"


def form_of(given: Any) -> str:
    """Returns dtype and shape of an array or tensor, or the type of anything else, for a message."""
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        return f"{type(given).__module__}.{type(given).__name__} of {given.dtype} {list(given.shape)}"
    return f"a {type(given).__name__}"


def check_finite(what: str, rows: "Tensor") -> None:
    """Raises `NotFinite` if one of `rows` [B, ...] holds a number that is NaN or infinite."""
    rows = rows.detach()
    if rows.numel() and not all(math.isfinite(end) for end in rows.aminmax()):  # a NaN is both ends
        bad = int((~rows.isfinite()).reshape(len(rows), -1).any(1).sum())
        raise NotFinite(f"{what} of {bad:,} of {len(rows):,} images are not finite (NaN or infinite): {CAUSE}")


CAUSE = "the model has diverged, its weights are damaged, or its input was not finite"
