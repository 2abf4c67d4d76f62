"""Lanes: parts of a batch that pass side by side on a CPU, each with its own share of the cores.

Two passes on a core each take less time than one on two cores, whose second waits between the parallel parts.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Result = TypeVar("Result")

MOST = 4
"""Lanes at once: Python itself runs in one at a time."""

_of_thread = threading.local()


def side_by_side(function: Callable[[slice], Result], n: int, device: torch.device) -> list[Result]:
    """What `function` gives for each part of n things, in their order; one part on other devices than a CPU.

    The parts depend on n and `torch.get_num_threads()` alone. Gradients are enabled as they are here.
    """
    threads = torch.get_num_threads()
    fitting = [lanes for lanes in range(1, MOST + 1) if threads % lanes == 0 and lanes <= n]
    lanes = max(fitting, default=1) if device.type == "cpu" else 1
    if lanes == 1:
        return [function(slice(0, n))]
    enabled = torch.is_grad_enabled()

    def in_lane(part: slice) -> Result:
        if torch.get_num_threads() != threads // lanes:
            torch.set_num_threads(threads // lanes)
        with torch.set_grad_enabled(enabled):
            return function(part)

    parts = [slice(lane * n // lanes, (lane + 1) * n // lanes) for lane in range(lanes)]
    futures = [_pool(lanes).submit(in_lane, part) for part in parts]
    wait(futures)
    torch.set_num_threads(threads)  # a lane's number is also what threads to come would begin with
    return [future.result() for future in futures]


def _pool(lanes: int) -> ThreadPoolExecutor:
    """Of the calling thread, so that callers do not wait for each other."""
    if getattr(_of_thread, "lanes", 0) != lanes:
        _of_thread.pool, _of_thread.lanes = ThreadPoolExecutor(lanes, "lane"), lanes
    return _of_thread.pool
