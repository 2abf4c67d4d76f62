"""The levels at which kernel tests run here, and why not at the others."""

from functools import lru_cache

from flowpp import levels, native


@lru_cache
def untested() -> dict[str, str]:
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


def tested() -> list[str]:
    """The levels of kernels at which these tests run, from the lowest to the highest."""
    return [name for name in levels.levels() if name not in untested()]


def in_words() -> str:
    """Both, in one line."""
    left_out: dict[str, list[str]] = {}
    for name, reason in untested().items():
        left_out.setdefault(reason, []).append(name)
    parts = [", ".join(["plain", *tested()]), *(f"not {', '.join(names)}: {why}" for why, names in left_out.items())]
    return "kernel levels: " + "; ".join(parts)
