"""The GPUs of this machine, as the driver's own tool tells of them: a worker must not touch CUDA to know."""

import csv
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

log = logging.getLogger(__name__)

_TOOL = "nvidia-smi"
_FIELDS = ("index", "memory.used", "memory.total", "utilization.gpu")
_TIMEOUT_SECONDS = 30
_MiB = 2**20


class Gpu(NamedTuple):
    """Its number as `name`; `utilization` is the share of the last second or so in which it computed, where known."""

    name: str
    used_bytes: int
    total_bytes: int
    utilization: float | None


def visible(found: Sequence[Gpu]) -> list[Gpu]:
    """Those of the machine's GPUs that CUDA_VISIBLE_DEVICES leaves to this process.

    As in CUDA, the list ends before the first entry that names no GPU. An identifier (GPU-..., MIG-...) counts as one
    GPU, as `found` does not contain identifiers.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(found)
    left: list[Gpu] = []
    for entry in map(str.strip, listed.split(",")):
        if entry.isdecimal() and int(entry) < len(found):
            left.append(found[int(entry)])
        elif entry.startswith(("GPU-", "MIG-")) and len(left) < len(found):
            left.append(found[len(left)])
        else:
            break
    return left


def gpus() -> list[Gpu]:
    """All that the driver shows this process; none where there is no driver, or it does not answer."""
    tool = shutil.which(_TOOL)
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("%s does not tell of GPUs: %s", _TOOL, error)
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(asked.stdout.splitlines())]
    return [
        Gpu(index, int(used) * _MiB, int(total) * _MiB, int(utilization) / 100 if utilization.isdigit() else None)
        for index, used, total, utilization in (row for row in rows if len(row) == len(_FIELDS))
        if used.isdigit() and total.isdigit()
    ]
