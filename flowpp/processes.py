"""One process or many: what the ranks that `torch.distributed.run` started do together.

Alone, nothing is communicated. Together, every rank calls the same methods in the same order.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from flowpp.devices import free_memory, resolve_device
from flowpp.environment import BrokenVariable, integer

_LAUNCHED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # `torch.distributed.run` sets these, too
_PR_SET_PDEATHSIG = 1
_MAX_PATH_BYTES = 4096


class Processes:
    """The processes of a run: this one's `rank` of `size`, and the `device` that it computes on."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device

    @property
    def leader(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """This process's part of n things; the parts of all are disjoint and make up the whole."""
        return range(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over the processes, the same in each; `values` becomes it."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def least_memory(self) -> float:
        """Bytes that each process may take, the same in each: as many as the one with the least."""
        least = torch.tensor(free_memory(self.device), dtype=torch.float64, device=self.device)
        if self.size > 1:
            distributed.all_reduce(least, distributed.ReduceOp.MIN)
        return float(least)

    def told(self, path: Path | None) -> Path | None:
        """The leader's path, in every process; the others wait for it."""
        if self.size == 1:
            return path
        content = torch.zeros(_MAX_PATH_BYTES, dtype=torch.uint8, device=self.device)
        encoded = os.fsencode(path or "")
        content[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        distributed.broadcast(content, src=0)
        told = os.fsdecode(bytes(content.tolist()).rstrip(b"\0"))
        return Path(told) if told else None

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module with the leader's parameters, whose backward pass averages gradients over the processes."""
        if self.size == 1:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        # gradients lie in the buffers that are sent, else there would be one more copy of the parameters
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def leave(self) -> None:
        """Ends one process of several, with status 0, once all have come here; alone, nothing happens.

        The interpreter's own end would race with threads of gloo that still run, and now and then abort.
        """
        if self.size > 1:
            distributed.barrier()  # one that leaves early would break the connections of those at work
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


@contextmanager
def joined(device: str | torch.device | None = None) -> Iterator[Processes]:
    """The processes that `torch.distributed.run` started, or this one alone.

    Raises `ValueError` for a device that is not there, and `BrokenVariable`.
    """
    size = integer("WORLD_SIZE", 1)
    if size <= 1 or distributed.is_initialized():
        rank = distributed.get_rank() if size > 1 else 0
        yield Processes(rank, size, _own_device(device))
        return
    if missing := [name for name in _LAUNCHED if name not in os.environ]:
        raise BrokenVariable(
            f"WORLD_SIZE is {size}, but {missing[0]} is not set: start with `torch.distributed.run`, or unset both"
        )
    _end_with_the_launcher()
    place = _own_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), size, place)
    finally:
        distributed.destroy_process_group()


def _own_device(device: str | torch.device | None) -> torch.device:
    place = resolve_device(device)
    return torch.device("cuda", integer("LOCAL_RANK", 0)) if place.type == "cuda" else place


def _end_with_the_launcher() -> None:
    """The launcher starts each rank in a session of its own: nobody else would end it with a killed launcher."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the launcher is gone")
