"""The environment in which tests run: of what a user's shell exports, only what names tools, places and threads.

A key of a running service, a proxy, a colour setting or a rank of a distributed run must not change what a test finds.
"""

import os

INHERITED = dict(os.environ)
"""What this process was started with; for tools that need the network, as a Docker engine."""

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
