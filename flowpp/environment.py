"""What a process inherits from the environment of the user who started it, and must not act on.

A notebook, a cluster's launcher or a shell exports variables for programs of its own. Here is the one list of those
that would break ours or change its results.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PLOTTING = frozenset({"MPLBACKEND", "MATPLOTLIBRC"})
"""They configure matplotlib, whose import raises if it cannot use them."""

_GROUP_PREFIXES = ("TORCHELASTIC_", "PET_")
_GROUP = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
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


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a Python process that is a member of no group, whoever started this one.

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
