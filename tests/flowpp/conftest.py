"""Images with something to learn, and a short run on them, made once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flowpp import levels
from flowpp.data import ImageSet, build_image_set
from flowpp.presets import PRESETS, resolve_model
from flowpp.training import train
from tests.levels import left_out, levels_here


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads; and runs are equal bit for bit only under as many of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NO_KERNELS = pytest.param("none", marks=pytest.mark.skip(reason="; ".join(sorted(set(left_out().values())))))


@pytest.fixture(params=levels_here() or [NO_KERNELS])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at each level of kernels."""
    with levels.at(request.param):
        yield request.param


@pytest.fixture(params=[levels.PLAIN, *levels_here()])
def plain_or_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test by plain PyTorch and at each level of kernels."""
    with levels.at(request.param):
        yield request.param


def blotches(n: int) -> np.ndarray:
    """Smooth colour gradients with a little noise, uint8 [n, 8, 8, 3]."""
    random = np.random.default_rng(n)
    corners = random.uniform(0, 255, (n, 2, 3))
    slope = np.linspace(0, 1, 8)[:, None]
    columns = corners[:, :1] * (1 - slope) + corners[:, 1:] * slope  # [n, 8, 3]
    images = columns[:, :, None] + random.normal(0, 3, (n, 8, 8, 3))
    return images.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def images_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .npy file of 120 images."""
    path = tmp_path_factory.mktemp("images") / "blotches.npy"
    np.save(path, blotches(120))
    return path


@pytest.fixture(scope="session")
def image_set(images_file: Path) -> ImageSet:
    return build_image_set(images_file, images_file.parent / "set")


@pytest.fixture(scope="session")
def finished_run(image_set: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 20 steps; not to be written to."""
    directory = tmp_path_factory.mktemp("run") / "run"
    model = resolve_model("tiny", {"dropout": 0.1}, image_set.shape)
    for _ in train(directory, model=model, training=PRESETS["tiny"].training, images=image_set):
        pass
    return directory
