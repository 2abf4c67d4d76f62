"""The tensors of checkpoints: weights, their moving average and the optimizer's state, as safetensors files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowpp.checkpoint import MANIFEST, MODEL, BadCheckpoint, check_file, read_manifest, weights_file, write_directory

if TYPE_CHECKING:
    from flowpp.model import FlowPP

Tensors = Mapping[str, Tensor]
Model = TypeVar("Model", bound="FlowPP")


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensors], **manifest: Any) -> None:
    """Writes the new `directory`, whole or not at all: a file for each name of `tensors`, then the manifest.

    As `flowpp.checkpoint.write_directory`. Raises `OSError` where the disk does not take it.
    """

    def writer(content: Tensors) -> Callable[[Path], None]:
        return lambda path: _write(content, path)

    write_directory(directory, {name: writer(content) for name, content in tensors.items()}, **manifest)


def _write(content: Tensors, path: Path) -> None:
    try:
        save_file({key: value.detach().contiguous() for key, value in content.items()}, path)
    except SafetensorError as error:  # which says of the disk what Python would say by an OSError
        raise OSError(f"{path.name}: {error}") from error


def read_weights(directory: Path, name: str, expected: Tensors) -> dict[str, Tensor]:
    """The weights in file `name` of a checkpoint, on the CPU, which must be those `expected` in name and shape.

    They have the dtype of the file. Raises `BadCheckpoint` if the file is missing or damaged, holds other tensors, or
    has them in several dtypes.
    """
    found = _read(directory, name, expected)
    try:
        _dtype(found)
    except ValueError as error:
        raise BadCheckpoint(f"{directory / name} holds {error}") from error
    return found


def read_tensors(directory: Path, name: str, expected: Tensors) -> dict[str, Tensor]:
    """The tensors of file `name` of a checkpoint, on the CPU, which must be those `expected` in name, shape and dtype.

    Raises `BadCheckpoint` if the file is missing or damaged, or holds other tensors.
    """
    found = _read(directory, name, expected)
    for key, tensor in found.items():
        if tensor.dtype != expected[key].dtype:
            raise BadCheckpoint(
                f"{directory / name} holds {key} as {tensor.dtype}; the weights need {expected[key].dtype}"
            )
    return found


def _read(directory: Path, name: str, expected: Tensors) -> dict[str, Tensor]:
    manifest = read_manifest(directory)
    path = directory / name
    if name not in manifest.files:
        raise BadCheckpoint(f"{directory} holds no {name}")
    check_file(path, manifest.files[name])
    try:
        found = load_file(path, device="cpu")
    except SafetensorError as error:
        raise BadCheckpoint(f"{path} is not a safetensors file: {error}") from error
    if missing := sorted(expected.keys() - found.keys()):
        raise BadCheckpoint(f"{path} lacks {_some(missing)} of the model in {MANIFEST}")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise BadCheckpoint(f"{path} holds {_some(unexpected)}, which the model in {MANIFEST} has not")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise BadCheckpoint(
                f"{path} holds {key} as {list(tensor.shape)}; the model in {MANIFEST} has {list(expected[key].shape)}"
            )
    return found


def _dtype(weights: Tensors) -> torch.dtype:
    """The one dtype of all weights. Raises `ValueError` if there are several, or one that is not floating-point."""
    names = {tensor.dtype: name for name, tensor in weights.items()}
    one, *others = names
    if others:
        raise ValueError(f"{names[one]} as {one} and {names[others[0]]} as {others[0]}; all weights have one dtype")
    if not one.is_floating_point:
        raise ValueError(f"{names[one]} as {one}; weights are floating-point numbers")
    return one


def save_model(model: "FlowPP", directory: Path) -> None:
    """Writes the weights and the configuration as a checkpoint without a recipe.

    Raises `ValueError` for weights of several dtypes, and on the meta device.
    """
    weights = model.state_dict()
    try:
        _dtype(weights)
    except ValueError as error:
        raise ValueError(f"the model holds {error}: convert it by model.float() or model.double()") from error
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError("the model is on the meta device, where weights have no values that could be saved")
    write_checkpoint(directory, {MODEL: weights}, model=model.config)


def load_model(kind: type[Model], directory: Path, device: str | torch.device) -> Model:
    """The model of a checkpoint in the dtype of its file and in evaluation mode, with its EMA weights if it has them.

    Raises `BadCheckpoint`.
    """
    manifest = read_manifest(directory)
    with torch.device("meta"):
        model = kind(manifest.model)
    name = weights_file(manifest)
    model.load_state_dict(read_weights(directory, name, model.state_dict()), assign=True)
    model.checkpoint_sha256 = manifest.files[name].sha256
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload] # as FlowPP makes them
    return model.eval()


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more tensors"
