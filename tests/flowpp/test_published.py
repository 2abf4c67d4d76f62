"""The authors' weights: every array of their files in its place, and the same log-likelihoods as their model's."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flowpp.checkpoint import BadCheckpoint, read_manifest
from flowpp.model import FlowPP
from flowpp.presets import PRESETS, PUBLISHED
from flowpp.published import entries, import_published
from tests.flowpp.authors import Authors

ARRAYS = {"cifar10": 1349, "imagenet32": 5739, "imagenet64": 2640}  # CIFAR-10's was counted in the authors' port


@dataclass
class Imported:
    preset: str
    authors: Authors
    log_weight: Tensor
    images: Tensor
    noise: Tensor
    file: Path
    checkpoint: Path


LARGEST = "imagenet32"  # 169 million parameters
CASES = [pytest.param(name, marks=pytest.mark.slow if name == LARGEST else ()) for name in PUBLISHED]


@pytest.fixture(scope="module", params=CASES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """A file of random values under the names that the authors' code asks for, and its checkpoint."""
    preset = request.param
    directory = tmp_path_factory.mktemp(preset)
    size = 64 if preset == "imagenet64" else 32
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    noise = torch.randn(images.shape, dtype=torch.float64, generator=generator)
    authors = Authors(preset, seed=2)
    log_weight = authors.log_weight(images.double().permute(0, 2, 3, 1), noise.permute(0, 2, 3, 1))
    file = directory / f"{preset}.npz"
    np.savez(file, **authors.v.values)
    import_published(file, preset, directory / "checkpoint")
    return Imported(preset, authors, log_weight, images, noise, file, directory / "checkpoint")


def test_log_prob_is_that_of_the_authors_model_within_1e_6_in_float64(imported: Imported) -> None:
    model = FlowPP.load(imported.checkpoint).double()
    with torch.no_grad():
        log_prob = model.log_prob(imported.images, noise=imported.noise)
    torch.testing.assert_close(log_prob, imported.log_weight, rtol=1e-9, atol=0)


def test_in_float32_the_same_noise_gives_nearly_the_same(imported: Imported) -> None:
    model = FlowPP.load(imported.checkpoint)
    with torch.no_grad():
        log_prob = model.log_prob(imported.images, noise=imported.noise)
    # random weights are chaotic: in float32 the authors' own formulas move ImageNet 64's by as much
    torch.testing.assert_close(log_prob, imported.log_weight, rtol=1e-2, atol=0)


def test_each_array_of_the_file_is_used_once_and_each_parameter_set_once(imported: Imported) -> None:
    table = list(entries(imported.preset))
    names = [name for entry in table for name in entry.names]
    assert len(names) == len(set(names)) == ARRAYS[imported.preset]
    assert set(names) == imported.authors.v.values.keys()
    assert set(imported.authors.v.uses.values()) == {1}
    with torch.device("meta"):
        parameters = FlowPP(imported.preset).state_dict()
    assert len(table) == len(parameters)
    assert {entry.parameter for entry in table} == parameters.keys()


def test_each_tensor_holds_its_arrays_values_and_no_others(imported: Imported) -> None:
    parameters = FlowPP.load(imported.checkpoint).state_dict()
    for entry in entries(imported.preset):
        theirs = np.concatenate([imported.authors.v.values[name].ravel() for name in entry.names])
        ours = parameters[entry.parameter].numpy()
        np.testing.assert_array_equal(np.sort(ours, axis=None), np.sort(theirs), err_msg=entry.parameter)


def test_the_manifest_says_where_the_weights_came_from(imported: Imported) -> None:
    manifest = read_manifest(imported.checkpoint)
    assert manifest.source_sha256
    assert manifest.model == PRESETS[imported.preset].model


@pytest.fixture(scope="module")
def cifar10() -> dict[str, np.ndarray]:
    """All arrays of CIFAR-10's file, zeros."""
    return {name: np.zeros(entry.shape, np.float32) for entry in entries("cifar10") for name in entry.names}


def refused(arrays: dict[str, np.ndarray], directory: Path, preset: str = "cifar10") -> str:
    file = directory / "weights.npz"
    np.savez(file, **arrays)
    with pytest.raises(BadCheckpoint) as refusal:
        import_published(file, preset, directory / "checkpoint")
    assert not (directory / "checkpoint").exists()
    return str(refusal.value)


def test_what_is_missing_and_what_is_left_over_is_listed(cifar10: dict[str, np.ndarray], tmp_path: Path) -> None:
    arrays = dict(cifar10)
    arrays["Norm/norm0/gain"] = arrays.pop("Norm/norm0/g")
    del arrays["context_proc/proj/b"]
    sentence = refused(arrays, tmp_path)
    assert "2 missing: Norm/norm0/g, context_proc/proj/b; 1 left over: Norm/norm0/gain" in sentence


def test_a_long_list_is_cut_and_counted(cifar10: dict[str, np.ndarray], tmp_path: Path) -> None:
    sentence = refused({"x": np.zeros(1)}, tmp_path)
    assert "1,349 missing" in sentence
    assert "and 1,329 more; 1 left over: x" in sentence


def test_an_array_of_another_shape_is_named_with_both(cifar10: dict[str, np.ndarray], tmp_path: Path) -> None:
    sentence = refused(cifar10 | {"Pointwise/W0": np.zeros((4, 4), np.float32)}, tmp_path)
    assert "1 of another kind: Pointwise/W0: float32 [4, 4] instead of float [3, 3]" in sentence


def test_an_array_with_nan_is_named(cifar10: dict[str, np.ndarray], tmp_path: Path) -> None:
    broken = cifar10["Pointwise/W1"] * np.nan
    assert "Pointwise/W1 with values that are not finite" in refused(cifar10 | {"Pointwise/W1": broken}, tmp_path)


def test_pickled_arrays_are_refused_unread(cifar10: dict[str, np.ndarray], tmp_path: Path) -> None:
    sentence = refused(cifar10 | {"Pointwise/W1": np.array([print], dtype=object)}, tmp_path)
    assert "Pointwise/W1: object [1] instead of float [3, 3]" in sentence


def test_another_presets_file_is_refused(cifar10: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert "does not hold the authors' imagenet64 weights, 2,640 arrays" in refused(cifar10, tmp_path, "imagenet64")


def test_a_preset_without_published_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no weights of 'small'; they did of cifar10, imagenet32, imagenet64"):
        import_published(tmp_path / "x.npz", "small", tmp_path / "checkpoint")


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 1000])
def test_a_file_that_is_no_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"x\.npz is no \.npz file that can be read"):
        import_published(tmp_path / "x.npz", "cifar10", tmp_path / "checkpoint")


def test_a_truncated_array_is_refused(cifar10: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", **cifar10)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "cut.npz", "w") as cut:
        for info in whole.infolist():
            content = whole.read(info)
            cut.writestr(info.filename, content[:-8] if info.filename == "Pointwise/W1.npy" else content)
    with pytest.raises(BadCheckpoint, match="Pointwise/W1, which cannot be read"):
        import_published(tmp_path / "cut.npz", "cifar10", tmp_path / "checkpoint")
