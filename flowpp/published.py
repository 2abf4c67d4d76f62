"""The authors' published weights: which array of their .npz files is which of our parameters. Needs no torch.

Names and layouts are those of the authors' TensorFlow code (`aravindsrinivas/flowpp`) and of the loaders of their
PyTorch port (`hojonathanho/localbitsback`). TensorFlow keeps a convolution as (height, width, in, out), a 1x1 one as
(in, out), and what we have as (C, H, W) as (H, W, C).
"""

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from safetensors.numpy import save_file

from flowpp.checkpoint import MODEL, BadCheckpoint, describe_file, write_directory
from flowpp.config import DequantizerConfig, ModelConfig, Shape, flow_shape, stage_couplings
from flowpp.presets import PRESETS, PUBLISHED

_MOST_NAMED = 20
_MAX_HEADER_BYTES = 2**16

Layout = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Entry:
    """One of our parameters: `layout` makes it of the authors' arrays `names`, each of `shape`."""

    parameter: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout


def import_published(path: Path, preset: str, directory: Path) -> None:
    """Writes the new checkpoint `directory` from the authors' .npz file, whole or not at all.

    Every array of the file becomes a part of exactly one parameter, and every parameter is set. Raises
    `BadCheckpoint` for a preset without published weights and for a file with other arrays; the message lists what is
    missing, what is left over, and what has another shape.
    """
    if preset not in PUBLISHED:
        raise BadCheckpoint(f"the authors published no weights of {preset!r}; they did of {', '.join(PUBLISHED)}")
    config = PRESETS[preset].model
    table = list(entries(preset))
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive, path, preset, table)
            parameters = {
                entry.parameter: np.ascontiguousarray(
                    entry.layout(*(_read(archive, path, name) for name in entry.names))
                )
                for entry in table
            }
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise BadCheckpoint(f"{path.name} is no .npz file that can be read: {error}") from error
    write_directory(
        directory,
        {MODEL: lambda file: save_file(parameters, file)},
        model=config,
        source_sha256=describe_file(path).sha256,
    )


def entries(preset: str) -> Iterator[Entry]:
    """Our parameters of a published model, each with the authors' names for it."""
    return _Table(PRESETS[preset].model, _CIFAR10 if preset == "cifar10" else _IMAGENET).entries()


@dataclass(frozen=True)
class _Style:
    """What differs between the authors' CIFAR-10 and ImageNet code."""

    proj_in: str
    proj_out: str
    flat_layer_norm: bool
    suffix: str


_CIFAR10 = _Style("proj_in", "proj_out", flat_layer_norm=False, suffix="")
_IMAGENET = _Style("c1", "c2", flat_layer_norm=True, suffix="/ExponentialMovingAverage")


class _Table:
    """Walks a model as `flowpp.model.architecture` builds it, with the authors' counters of names.

    The couplings of the dequantizer come first. A first Norm, Pointwise or coupling has no suffix, the next `_1`.
    """

    def __init__(self, config: ModelConfig, style: _Style) -> None:
        self.config = config
        self.style = style
        self._counts: Counter[str] = Counter()

    def entries(self) -> Iterator[Entry]:
        declared = self.config.dequantizer
        yield from self._context(declared)
        yield from self._flow(
            "dequantizer.flow", 0, declared.flow, declared.blocks, declared.attention, declared.context_filters
        )
        yield from self._flow(
            "flow", 1, self.config.flow, self.config.blocks, self.config.attention, 0
        )  # after the logit

    def _context(self, declared: DequantizerConfig) -> Iterator[Entry]:
        channels, height, width = self.config.image_shape
        filters = declared.context_filters
        ours, theirs = "dequantizer.context", "context_proc"
        if declared.context == "attention":
            yield self._positions(f"{ours}.position", f"{theirs}/pos_emb_dq", (height, width // 2, filters))
        yield from self._convolution(f"{ours}.proj_in", f"{theirs}/proj", 3, 2 * channels, filters)
        for i in range(declared.context_blocks):
            block = f"{ours}.blocks.{i}"
            yield from self._gated_convolution(f"{block}.convolution", f"{theirs}/c{i}", filters, 0, gate_kernel=3)
            if declared.context != "convolution":
                yield from self._layer_norm(f"{block}.norm1", f"{theirs}/dqln{i}", filters)
            if declared.context == "attention":
                yield from self._attention(f"{block}.attention", f"{theirs}/dqattn{i}", filters)
                yield from self._layer_norm(f"{block}.norm2", f"{theirs}/ln{i}", filters)

    def _flow(
        self, ours: str, index: int, flow: tuple[str, ...], blocks: int, attention: str, context_filters: int
    ) -> Iterator[Entry]:
        shape = self.config.image_shape
        for stage in flow:
            by_columns = stage.startswith("columns")
            channels, height, width = shape
            half = (channels, height, width // 2) if by_columns else (channels // 2, height, width)
            index += by_columns or stage == "squeeze"
            for _ in range(stage_couplings(stage)):
                yield from self._normalization(f"{ours}.transforms.{index}", half)
                index += 1
                if self.config.pointwise:
                    yield self._pointwise(f"{ours}.transforms.{index}", half[0])
                    index += 1
                yield from self._coupling(f"{ours}.transforms.{index}", half, blocks, attention, context_filters)
                index += 2  # and the flip
            index += by_columns
            shape = flow_shape((stage,), shape)

    def _coupling(self, ours: str, half: Shape, blocks: int, attention: str, context_filters: int) -> Iterator[Entry]:
        channels, height, width = half
        filters, style = self.config.filters, self.style
        ours = f"{ours}.conditioner"
        theirs = self._next("MixLogisticAttnCoupling" if attention == "softmax" else "MixLogisticCoupling")
        yield self._positions(f"{ours}.position", f"{theirs}/pos_emb", (height, width, filters))
        yield from self._convolution(f"{ours}.proj_in", f"{theirs}/{style.proj_in}", 3, channels, filters)
        for i in range(blocks):
            mine, its = f"{ours}.blocks.{i}", f"{theirs}/block{i}"
            yield from self._gated_convolution(f"{mine}.convolution", f"{its}/conv", filters, context_filters, 1)
            yield from self._layer_norm(f"{mine}.norm1", f"{its}/ln1", filters)
            if attention == "softmax":
                yield from self._attention(f"{mine}.attention", f"{its}/attn", filters)
                yield from self._layer_norm(f"{mine}.norm2", f"{its}/ln2", filters)
        inputs = 2 * filters if self.config.output_elu else filters
        outputs = channels * (2 + 3 * self.config.components)
        yield from self._convolution(f"{ours}.proj_out", f"{theirs}/{style.proj_out}", 3, inputs, outputs)

    def _gated_convolution(
        self, ours: str, theirs: str, filters: int, context_filters: int, gate_kernel: int
    ) -> Iterator[Entry]:
        yield from self._convolution(f"{ours}.proj_in", f"{theirs}/c1", 3, 2 * filters, filters)
        if context_filters:
            yield from self._convolution(f"{ours}.proj_context", f"{theirs}/a_proj", 1, 2 * context_filters, filters)
        yield from self._convolution(f"{ours}.proj_gate", f"{theirs}/c2", gate_kernel, 2 * filters, 2 * filters)

    def _attention(self, ours: str, theirs: str, filters: int) -> Iterator[Entry]:
        yield from self._convolution(f"{ours}.proj_in", f"{theirs}/proj1", 1, filters, 3 * filters)
        yield from self._convolution(f"{ours}.proj_gate", f"{theirs}/proj2", 1, filters, 2 * filters)

    def _convolution(self, ours: str, theirs: str, kernel: int, inputs: int, outputs: int) -> Iterator[Entry]:
        weight = "V" if self.config.weight_norm else "W"
        if kernel == 1:
            yield self._entry(f"{ours}.weight", (inputs, outputs), _dense, f"{theirs}/{weight}")
        else:
            shape = (kernel, kernel, inputs, outputs)
            yield self._entry(f"{ours}.weight", shape, _convolution, f"{theirs}/{weight}")
        if self.config.weight_norm:
            yield self._entry(f"{ours}.gain", (outputs,), _as_it_is, f"{theirs}/g")
        yield self._entry(f"{ours}.bias", (outputs,), _as_it_is, f"{theirs}/b")

    def _layer_norm(self, ours: str, theirs: str, filters: int) -> Iterator[Entry]:
        shape = (filters,) if self.style.flat_layer_norm else (1, 1, 1, filters)
        yield self._entry(f"{ours}.gain", shape, np.ravel, f"{theirs}/g")
        yield self._entry(f"{ours}.bias", shape, np.ravel, f"{theirs}/b")

    def _normalization(self, ours: str, half: Shape) -> Iterator[Entry]:
        channels, height, width = half
        theirs = self._next("Norm")
        for mine, its in (("gain", "g"), ("bias", "b")):
            halves = (f"{theirs}/norm0/{its}", f"{theirs}/norm1/{its}")
            yield self._entry(f"{ours}.{mine}", (height, width, channels), _channels_first, *halves)

    def _pointwise(self, ours: str, channels: int) -> Entry:
        theirs = self._next("Pointwise")
        return self._entry(f"{ours}.weight", (channels, channels), _stacked, f"{theirs}/W0", f"{theirs}/W1")

    def _positions(self, ours: str, theirs: str, shape: tuple[int, int, int]) -> Entry:
        return self._entry(ours, shape, _channels_first, theirs)

    def _next(self, kind: str) -> str:
        count = self._counts[kind]
        self._counts[kind] += 1
        return f"{kind}_{count}" if count else kind

    def _entry(self, parameter: str, shape: tuple[int, ...], layout: Layout, *names: str) -> Entry:
        return Entry(parameter, tuple(f"{name}{self.style.suffix}" for name in names), shape, layout)


def _convolution(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(3, 2, 0, 1)


def _dense(weight: np.ndarray) -> np.ndarray:
    return weight.T[:, :, None, None]


def _channels_first(*halves: np.ndarray) -> np.ndarray:
    return np.concatenate([half.transpose(2, 0, 1) for half in halves])


def _stacked(*matrices: np.ndarray) -> np.ndarray:
    return np.stack(matrices)


def _as_it_is(values: np.ndarray) -> np.ndarray:
    return values


def _check(archive: zipfile.ZipFile, path: Path, preset: str, table: list[Entry]) -> None:
    """Raises `BadCheckpoint` where the file's arrays, by their headers, are not those of the table."""
    expected = {name: entry.shape for entry in table for name in entry.names}
    found = [info.filename.removesuffix(".npy") for info in archive.infolist()]
    faults = [
        *_listed("missing", sorted(expected.keys() - set(found))),
        *_listed("left over", sorted(set(found) - expected.keys())),
        *_listed("there twice", sorted(name for name, count in Counter(found).items() if count > 1)),
    ]
    if not faults:
        shapes = {name: _header(archive, path, name) for name in expected}
        faults = _listed(
            "of another kind",
            [
                f"{name}: {dtype} {list(shape)} instead of float {list(expected[name])}"
                for name, (shape, dtype) in shapes.items()
                if shape != expected[name] or dtype.kind != "f"
            ],
        )
    if faults:
        raise BadCheckpoint(
            f"{path.name} does not hold the authors' {preset} weights, {len(expected):,} arrays: {'; '.join(faults)}"
        )


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:_MOST_NAMED])
    more = f", and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return [f"{len(names):,} {what}: {shown}{more}"]


def _header(archive: zipfile.ZipFile, path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype, read without the array, whose size they bound."""
    with archive.open(f"{name}.npy") as file:
        try:
            version = npy.read_magic(file)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, _, dtype = read(file, max_header_size=_MAX_HEADER_BYTES)
        except Exception as error:  # numpy lets through what Python's tokenizer and parser raise
            raise BadCheckpoint(f"{path.name} holds {name} without a .npy header that can be read") from error
    return shape, dtype


def _read(archive: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    """An array whose header has been checked, as float32. Raises `BadCheckpoint`."""
    with archive.open(f"{name}.npy") as file:
        try:
            values = npy.read_array(file, allow_pickle=False).astype(np.float32)
        except ValueError as error:
            raise BadCheckpoint(f"{path.name} holds {name}, which cannot be read: {error}") from error
    if not np.isfinite(values).all():
        raise BadCheckpoint(f"{path.name} holds {name} with values that are not finite")
    return values
