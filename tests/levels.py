"""The tested levels of kernels, and the reasons for leaving out the others."""

from functools import lru_cache

from flowpp import levels, native


@lru_cache
def left_out() -> dict[str, str]:
    """The levels that these tests leave out, each with the reason."""
    found = dict(levels.lacking())
    for name in levels.levels():
        if name in found:
            continue
        if name not in levels.usable():
            found[name] = f"{levels.VARIABLE} is {levels.of_environment()}"
        elif reason := native.cannot_build(name):
            found[name] = reason
    return found


def levels_here() -> list[str]:
    """The tested levels of kernels, from the lowest to the highest."""
    return [name for name in levels.levels() if name not in left_out()]


def in_words() -> str:
    """Both, in one line."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out().items():
        by_reason.setdefault(reason, []).append(name)
    parts = [
        ", ".join(["plain", *levels_here()]),
        *(f"not {', '.join(names)}: {why}" for why, names in by_reason.items()),
    ]
    return "kernel levels: " + "; ".join(parts)
