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
        self._models: OrderedDict[str, FlowPP] = OrderedDict()
        self._changing = threading.Lock()
        self.device = resolve_device("auto")

    def get(self, checkpoint: Checkpoint) -> FlowPP:
        """The model, loaded where it was not. Raises `NotFound`, `DamagedArtifact` and `BadCheckpoint`."""
        with self._changing:
            if checkpoint.id not in self._models:
                model = FlowPP.load(self._checkpoints.fetch(checkpoint), self.device).eval().requires_grad_(False)
                model.replay()
                self._models[checkpoint.id] = model
            self._models.move_to_end(checkpoint.id)
            sizes = {warm: _bytes(model) for warm, model in self._models.items()}
            while len(self._models) > 1 and sum(sizes.values()) > self._capacity:
                evicted, _ = self._models.popitem(last=False)
                del sizes[evicted]
                WARM_MODELS.remove(evicted)
            for warm, size in sizes.items():
                WARM_MODELS.labels(warm).set(size)
            return self._models[checkpoint.id]

    def __contains__(self, checkpoint_id: str) -> bool:
        return checkpoint_id in self._models


def _bytes(model: FlowPP) -> int:
    """Of its parameters, and of the recordings that have been made of its passes."""
    assert model.replays is not None
    return model.replays.nbytes
