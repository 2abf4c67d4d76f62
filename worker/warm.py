"""Warm models: the least recently used give way when their parameters fill the memory that is set."""

import threading
from collections import OrderedDict

from flowpp.devices import resolve_device
from flowpp.model import FlowPP
from worker.metrics import WARM_MODELS
from worker.models import Checkpoint, Checkpoints


class WarmModels:
    """Loaded models by checkpoint, of at most `capacity` bytes together; the one in use stays in any case."""

    def __init__(self, checkpoints: Checkpoints, capacity: int) -> None:
        self._checkpoints = checkpoints
        self._capacity = capacity
        self._models: OrderedDict[str, tuple[FlowPP, int]] = OrderedDict()
        self._changing = threading.Lock()
        self.device = resolve_device("auto")

    def get(self, checkpoint: Checkpoint) -> FlowPP:
        """The model, loaded where it was not. Raises `NotFound`, `DamagedArtifact` and `BadCheckpoint`."""
        with self._changing:
            if checkpoint.id not in self._models:
                model = FlowPP.load(self._checkpoints.fetch(checkpoint), self.device).eval().requires_grad_(False)
                size = sum(tensor.nbytes for tensor in model.state_dict().values())
                self._models[checkpoint.id] = model, size
                WARM_MODELS.labels(checkpoint.id).set(size)
            self._models.move_to_end(checkpoint.id)
            while len(self._models) > 1 and sum(size for _, size in self._models.values()) > self._capacity:
                evicted, _ = self._models.popitem(last=False)
                WARM_MODELS.remove(evicted)
            return self._models[checkpoint.id][0]

    def __contains__(self, checkpoint_id: str) -> bool:
        return checkpoint_id in self._models
