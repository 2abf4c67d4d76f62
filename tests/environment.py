"""The tests' environment: the user's variables for tools, directories, locale and threads, and no others.

A key of a running service, a proxy, a colour setting or a rank of a distributed run must not change a test's result.
"""

import os

INHERITED = dict(os.environ)
"""The environment at the start of this process, for tools that need the network, for example a Docker engine."""

_KEPT = {
    "CC",
    "CHROMIUM",
    "CXX",
    "FLOWPP_KERNELS",
    "HOME",
    "LANG",
    "LOGNAME",
    "PATH",
    "SHELL",
    "TMPDIR",
    "TORCH_INDEX",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
}
_KEPT_PREFIXES = ("CUDA_", "LC_", "LD_", "NVIDIA_", "OMP_", "PYTEST_", "TRITON_", "XDG_")
_KEPT_OF_PYTHON = {"PYTHONHOME", "PYTHONPATH", "PYTHONUTF8"}


def clean() -> None:
    """Removes every other variable from this process's environment, and so from that of its children."""
    for name in INHERITED:
        if name not in _KEPT | _KEPT_OF_PYTHON and not name.startswith(_KEPT_PREFIXES):
            os.environ.pop(name, None)
