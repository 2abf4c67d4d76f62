"""The inherited environment: variables and streams that must neither break a process nor change its results.

A notebook, a cluster's launcher or a shell exports variables for its own programs. This module lists them.
"""

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

PLOTTING = frozenset({"MPLBACKEND", "MATPLOTLIBRC"})
"""They configure matplotlib. Its import raises if it cannot use them."""

JOINING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A process needs all of them to join its group."""

_GROUP_PREFIXES = ("TORCHELASTIC_", "PET_")
_GROUP = frozenset(
    {
        *JOINING,
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    }
)
"""`torch.distributed.run` passes them to the processes of a group; PET_... are options of its own."""

_PYTHON_KEPT = frozenset({"PYTHONPATH", "PYTHONHOME", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"})


@contextmanager
def without(names: frozenset[str]) -> Iterator[None]:
    """Removes variables from this process's environment during the block."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class BrokenVariable(ValueError):
    """An environment variable that cannot be used. The message is a sentence that names it."""


@dataclass(frozen=True)
class Group:
    """The `size` processes that `torch.distributed.run` started, `local_size` of them on this machine."""

    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def group() -> Group:
    """Returns the group that the environment names; one process alone if WORLD_SIZE is unset or 1.

    Raises `BrokenVariable` if only some of the variables are set, as in a shell of a cluster's job, or if one is no
    number.
    """
    if os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        return Group()
    if missing := [name for name in JOINING if not os.environ.get(name)]:
        raise BrokenVariable(
            f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']} without {', '.join(missing)}: start several "
            "processes with `python -m torch.distributed.run`, which sets all of them, or unset WORLD_SIZE to train in "
            "one process"
        )
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise BrokenVariable(f"the variable {name} must be a number, not {os.environ[name]!r}")
        numbers[name] = int(os.environ[name])
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[rank] >= numbers[size]:
            raise BrokenVariable(f"the variable {rank} must be less than {size}={numbers[size]}, not {numbers[rank]}")
    return Group(numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"])


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for a Python process that is a member of no group.

    It lacks what configures a group of processes, plots and the Python interpreter (PYTHONWARNINGS, PYTHONOPTIMIZE,
    PYTHONINSPECT, ...). Text is UTF-8 in any locale, and modules of the current directory shadow none of ours.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _GROUP | PLOTTING
        and not name.startswith(_GROUP_PREFIXES)
        and (name in _PYTHON_KEPT or not name.startswith("PYTHON"))
    }
    return kept | {"PYTHONUTF8": "1", "PYTHONSAFEPATH": "1"}


def settle_streams() -> None:
    """Makes the standard streams usable: closed ones lead nowhere, and characters that one lacks are escaped.

    A parent may have closed them. The next file that this process opens would then take the number of standard output,
    and receive the output of libraries.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
