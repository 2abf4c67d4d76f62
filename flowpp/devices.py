"""Devices: which one to compute on, and the ways in which its memory runs out."""

import resource
from pathlib import Path

import torch

from flowpp.environment import group
from flowpp.memory import of_machine


def resolve_device(name: str | torch.device | None) -> torch.device:
    """`auto` (or none) is CUDA where there is a device, else the CPU. Raises `ValueError` for one that is not there."""
    wanted = "auto" if name is None else str(name)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {wanted}: torch finds no CUDA device on this machine; use cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device {wanted}: torch knows no such device; use cpu, cuda or cuda:N") from error
    if wanted == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0")
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, CUDA or torch's CPU allocator ran out; the last one raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def free_memory(device: torch.device) -> float:
    """Bytes that a training may take in this process: of a GPU, what is free; of the CPU, `memory_of` it."""
    if device.type != "cuda":
        return memory_of(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of an earlier run
    return torch.cuda.mem_get_info(device)[0] + kept


def _limits() -> list[float]:
    """Bytes of the resident set that limits on this process leave: what else it has mapped counts towards them."""
    status = Path("/proc/self/status")
    if not status.exists():
        return []
    found = dict(
        line.split(":")
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith("Vm")
    )
    size = {name: int(value.split()[0]) * 1024 for name, value in found.items()}
    limits = {
        "VmSize": resource.getrlimit(resource.RLIMIT_AS)[0],
        "VmData": resource.getrlimit(resource.RLIMIT_DATA)[0],
    }
    return [limit - size[name] + size["VmRSS"] for name, limit in limits.items() if limit != resource.RLIM_INFINITY]


def memory_of(device: torch.device) -> float:
    """Bytes of a GPU's memory.

    Of the CPU, this process's share of the machine's, one of those that `torch.distributed.run` started on it; or less,
    where a limit on the process's data or addresses (`ulimit -d`, `-v`) leaves less.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([of_machine() / group().local_size, *_limits()])
