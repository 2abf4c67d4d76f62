"""Devices: which one to compute on, and the ways in which its memory runs out."""

import torch

from flowpp.memory import of_machine


def resolve_device(name: str | torch.device | None) -> torch.device:
    """`auto` (or none) is CUDA where there is a device, else the CPU. Raises `ValueError` for one that is not there."""
    wanted = "auto" if name is None else str(name)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {wanted}: torch finds no CUDA device on this machine; use cpu")
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else torch.device(wanted)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, CUDA or torch's CPU allocator ran out; the last one raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory; of the CPU, the machine's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else of_machine()
