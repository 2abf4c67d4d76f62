"""The training images in the order of a run, cut into batches, of which each process reads its share."""

from functools import lru_cache

import numpy as np

from flowpp.config import TrainingConfig
from flowpp.processes import Processes
from flowpp.seeds import Stream, seed_of


class Batches:
    """A permutation of the images an epoch, one after the other, cut into batches; a function of seed and position.

    With `horizontal_flips` each image is mirrored in half of the epochs, by chance.
    """

    def __init__(self, images: np.ndarray, recipe: TrainingConfig, processes: Processes) -> None:
        self.images = images
        self.recipe = recipe
        self._share = processes.share(recipe.batch_size)
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._flips = lru_cache(maxsize=2)(self._draw_flips)

    def first(self) -> np.ndarray:
        """The images of the data-dependent initialization: those that the run begins with."""
        return self._taken(range(min(self.recipe.init_batch_size, len(self.images))))

    def after(self, images_seen: int) -> np.ndarray:
        """This process's share of the next batch, uint8 [b, H, W, C]."""
        return self._taken(range(images_seen + self._share.start, images_seen + self._share.stop))

    def _taken(self, positions: range) -> np.ndarray:
        places = [divmod(position, len(self.images)) for position in positions]
        taken = self.images[[self._permutation(epoch)[place] for epoch, place in places]]
        if self.recipe.horizontal_flips:
            flips = np.array([self._flips(epoch)[place] for epoch, place in places], bool)
            taken[flips] = taken[flips, :, ::-1]
        return taken

    def _permute(self, epoch: int) -> np.ndarray:
        return self._random(Stream.ORDER, epoch).permutation(len(self.images))

    def _draw_flips(self, epoch: int) -> np.ndarray:
        return self._random(Stream.FLIPS, epoch).random(len(self.images)) < 0.5

    def _random(self, stream: Stream, epoch: int) -> np.random.Generator:
        return np.random.default_rng(seed_of(self.recipe.seed, stream, epoch))
