"""The command line: `python -m flowpp train | likelihood | gradient | sample | interpolate | import | encode | decode`.

Exit codes: 0 done, or told by SIGTERM to stop, with a checkpoint; 130 the same by Ctrl-C; 1 failed; 2 bad input, with a
sentence on stderr. torch loads inside the commands, so that help and errors come at once.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import numpy as np
import typer
from pydantic import ValidationError

from flowpp import levels, logs, tracing
from flowpp.arguments import NotFinite
from flowpp.checkpoint import BadCheckpoint
from flowpp.console import (
    BadInput,
    errors,
    files_in,
    say,
    show,
    show_training,
    stopping_on_signals,
    track,
)
from flowpp.data import BadImages
from flowpp.declaration import declare_run
from flowpp.durable import new_directory
from flowpp.environment import BrokenVariable, settle_streams
from flowpp.levels import UnsupportedLevel
from flowpp.presets import PRESETS
from flowpp.run_directory import CONFIG, BadRunDirectory, RunDirectory, TrainingError, describe, find_checkpoint
from flowpp.sources import Split, open_images, read_latents

if TYPE_CHECKING:
    import torch

    from flowpp.model import FlowPP

INTERRUPTED = 130
"""The exit code of what Ctrl-C has ended, as shells have it."""

app = typer.Typer(
    help="Flow++: train a flow on images, score images in bits/dim, draw samples, encode and decode.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


IMAGES = "A folder or archive (.zip, .tar, .tar.gz) of images, .npy, .npz, CIFAR-10's archives, an image set or images."
CheckpointPath = Annotated[Path, typer.Argument(help="A checkpoint, or a run directory for its best one.")]
ImagesPath = Annotated[list[Path], typer.Option("--images", help=f"{IMAGES} May be repeated for several image files.")]
SplitName = Annotated[Split, typer.Option(help="Which images of a set that has parts.")]
DeviceName = Annotated[Device, typer.Option(help="Where to compute; auto is CUDA where there is one.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random numbers.")]
BatchSize = Annotated[int, typer.Option(min=1, max=65_536, help="Images a forward pass; less where memory is short.")]


@app.command()
def train(
    run_directory: Annotated[Path, typer.Argument(help="Where configuration, metrics and checkpoints are kept.")],
    data: Annotated[Path | None, typer.Option(help=f"Begins a new run on these images. {IMAGES}")] = None,
    preset: Annotated[str | None, typer.Option(help=f"{', '.join(PRESETS)}; small if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; short for --set training.steps=N.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Changes the preset: model.filters=48, training.batch_size=16, ..."
        ),
    ] = None,
    resume_from: Annotated[Path | None, typer.Option(help="Starts from a checkpoint of another run.")] = None,
    test_as_validation: Annotated[
        bool, typer.Option("--test-as-validation", help="Test images of --data choose the best checkpoint.")
    ] = False,
    device: DeviceName = Device.AUTO,
    json_events: Annotated[bool, typer.Option("--json-events", help="JSON lines instead of a progress bar.")] = False,
) -> None:
    """Begins a run, or goes on with the one in RUN_DIRECTORY from its newest checkpoint.

    Ctrl-C and SIGTERM write a checkpoint and end it, with exit code 130 and 0; `train RUN_DIRECTORY` goes on from
    there. metrics.jsonl, checkpoints/, result.json and training_curve.png appear in RUN_DIRECTORY. Several processes
    share each batch under `python -m torch.distributed.run --standalone --nproc-per-node N -m flowpp train ...`.
    """
    run = RunDirectory(run_directory)
    with stopping_on_signals() as stop:
        _device(device)
        if data is None and (preset or steps or overrides or resume_from or test_as_validation):
            message = "--preset, --steps, --set, --resume-from and --test-as-validation begin a new run and need --data"
            raise BadInput(message)
        if data is None and not (run_directory / CONFIG).exists():
            raise BadInput(f"{run_directory} holds no run to go on with; begin one with --data IMAGES")
        from flowpp.processes import joined
        from flowpp.recording import record, record_failure
        from flowpp.training import train as events

        with joined(device.value) as processes:
            if not processes.leader:
                processes.told(None)
                with record_failure(run):
                    for _ in events(run_directory, device=device.value, stop=stop.is_set):
                        pass
                processes.leave()
            if data is not None:
                declare_run(run, data, preset or "small", steps, overrides or [], resume_from, test_as_validation)
            processes.told(None)
            with _traced(), record(run, alone=processes.size == 1) as recorder:
                total = run.config.training.steps
                if recorder.step >= total:
                    say(_finished(run_directory, total))
                shown = events(run_directory, device=device.value, stop=stop.is_set)
                for event in show_training(shown, total, json_events):
                    recorder.step = event.step
            say(recorder.sentence)
            processes.leave()
            if stop.interrupted and recorder.step < total:  # one of several has left: its launcher would take fright
                raise typer.Exit(INTERRUPTED)


@app.command()
def likelihood(
    checkpoint: CheckpointPath,
    images: ImagesPath,
    output: Annotated[Path, typer.Option(help="New directory for likelihood.json, csv and png.")] = Path("likelihood"),
    importance_samples: Annotated[
        int, typer.Option(min=1, max=65_536, help="1 gives the variational bound, more a tighter one.")
    ] = 1,
    split: SplitName = Split.ALL,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    bits_map: Annotated[
        bool, typer.Option("--bits-map", help="Also where the bits are spent: bits_map.npz and bits_map.png.")
    ] = False,
    device: DeviceName = Device.AUTO,
) -> None:
    """Scores images: log-likelihood in nats and bits/dim of each, mean and standard error of all."""
    _check_free(output)
    names, pixels, sha256 = open_images(images, split)
    model = _load(checkpoint, device)
    from flowpp.likelihood import Likelihood, bits_maps
    from flowpp.likelihood import likelihood as batches
    from flowpp.sampling import write_bits_map

    estimates = track(batches(model, pixels, importance_samples, batch_size, seed), len(pixels), "image")
    scored = Likelihood(estimates, model.config.dimensions, importance_samples, seed, model.checkpoint_sha256, sha256)
    with new_directory(output) as unfinished:
        scored.write(unfinished, names)
        if bits_map:
            maps = track(bits_maps(model, pixels, seed), len(pixels), "map")
            write_bits_map(unfinished, pixels, maps, names)
    say(f"wrote {', '.join(files_in(output))}")  # stdout is the summary's
    show(json.dumps(scored.summary()))
    scored.check_finite()


@app.command()
def gradient(
    checkpoint: CheckpointPath,
    images: ImagesPath,
    output: Annotated[Path, typer.Option(help="New directory for gradient.npz and gradient.png.")] = Path("gradient"),
    split: SplitName = Split.ALL,
    seed: Seed = 0,
    device: DeviceName = Device.AUTO,
) -> None:
    """The gradient of log p with respect to the continuous images, in nats a channel value, float32 [N, H, W, C]."""
    _check_free(output)
    names, pixels, _ = open_images(images, split)
    model = _load(checkpoint, device)
    from flowpp.likelihood import gradients
    from flowpp.sampling import write_gradients

    found = track(gradients(model, pixels, seed), len(pixels), "image")
    with new_directory(output) as unfinished:
        write_gradients(unfinished, pixels, found, names)
    _show_files(output)


@app.command()
def sample(
    checkpoint: CheckpointPath,
    n: Annotated[int, typer.Option("--num-samples", "-n", min=1, max=100_000, help="How many.")] = 16,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="Scale of the latents; 1 is the model.")] = 1.0,
    output: Annotated[Path, typer.Option(help="New directory for grid.png, samples.npz and png/.")] = Path("samples"),
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: DeviceName = Device.AUTO,
) -> None:
    """Draws samples."""
    if math.isnan(temperature):  # which no range holds off
        raise BadInput("--temperature nan: expected is a number from 0 to 10")
    _check_free(output)
    model = _load(checkpoint, device)
    from flowpp.sampling import sample as batches
    from flowpp.sampling import write_samples

    images = track(batches(model, n, temperature, seed, batch_size), n, "sample")
    with new_directory(output) as unfinished:
        write_samples(unfinished, images)
    _show_files(output)


@app.command()
def interpolate(
    checkpoint: CheckpointPath,
    images: ImagesPath,
    n: Annotated[int, typer.Option("--num-samples", "-n", min=2, max=10_000, help="With both ends.")] = 9,
    output: Annotated[Path, typer.Option(help="New directory for grid.png, samples.npz and png/.")] = Path(
        "interpolation"
    ),
    seed: Seed = 0,
    device: DeviceName = Device.AUTO,
) -> None:
    """Images on the way from one to another, in latent space. Give two."""
    _check_free(output)
    _, pixels, _ = open_images(images, Split.ALL)
    if len(pixels) != 2:
        raise BadInput(f"--images gave {len(pixels)} images; interpolation is between two")
    model = _load(checkpoint, device)
    from flowpp.sampling import interpolation, write_samples

    between = track(interpolation(model, pixels, n, seed), n, "image")
    with new_directory(output) as unfinished:
        write_samples(unfinished, between)
    _show_files(output)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="The authors' .npz file.")],
    preset: Annotated[str, typer.Option(help="The model it is of: cifar10, imagenet32 or imagenet64.")],
    output: Annotated[
        Path | None, typer.Option(help="New checkpoint directory; the preset's name if not given.")
    ] = None,
) -> None:
    """Makes a checkpoint of the weights that the authors published."""
    from flowpp.published import import_published

    directory = output or Path(preset)
    _check_free(directory)
    if not file.is_file():
        raise BadInput(f"{file}: there is no such file")
    import_published(file, preset, directory)
    errors.print(f"wrote the checkpoint {directory}")


@app.command()
def encode(
    checkpoint: CheckpointPath,
    images: ImagesPath,
    output: Annotated[Path, typer.Option(help="New .npz file for `latents` and `names`.")] = Path("latents.npz"),
    split: SplitName = Split.ALL,
    seed: Seed = 0,
    device: DeviceName = Device.AUTO,
) -> None:
    """Writes the latents of images, float32 [N, C, H, W], which `decode` turns back into the same images."""
    _check_free(output)
    names, pixels, _ = open_images(images, split)
    model = _load(checkpoint, device)
    from flowpp.sampling import encode as batches
    from flowpp.sampling import write_arrays

    latents = track(batches(model, pixels, seed), len(pixels), "image")
    write_arrays(output, latents=latents, names=np.array(names))
    _show_files(output)


@app.command()
def decode(
    checkpoint: CheckpointPath,
    latents: Annotated[Path, typer.Argument(help="A .npz file with `latents`, as `encode` writes it.")],
    output: Annotated[Path, typer.Option(help="New directory for grid.png, samples.npz and png/.")] = Path("decoded"),
    device: DeviceName = Device.AUTO,
) -> None:
    """Turns latents back into images."""
    _check_free(output)
    model = _load(checkpoint, device)
    from flowpp.sampling import decode as batches
    from flowpp.sampling import write_samples

    z = read_latents(latents, model.config)
    images = track(batches(model, z), len(z), "image")
    with new_directory(output) as unfinished:
        write_samples(unfinished, images)
    _show_files(output)


@contextmanager
def _traced() -> Iterator[None]:
    """A span of the run, of whatever asked for it."""
    with tracing.sending("flowpp-training"), tracing.span("training run", parent=os.environ.get(tracing.PARENT, "")):
        yield


def _finished(run_directory: Path, steps: int) -> str:
    return (
        f"the run in {run_directory} has finished its {steps:,} steps, so that there is nothing to train; to train "
        f"its weights further, begin another run: train DIRECTORY --data IMAGES --resume-from {run_directory}"
    )


def _load(checkpoint: Path, device: Device) -> "FlowPP":
    path = find_checkpoint(checkpoint)
    from flowpp.model import FlowPP

    model = FlowPP.load(path, _device(device))
    model.replay()
    return model


def _device(device: Device) -> "torch.device":
    levels.of_environment()  # before any work, as a wrong device
    from flowpp.devices import resolve_device

    try:
        return resolve_device(device.value)
    except ValueError as error:
        raise BadInput(str(error)) from error


def _show_files(output: Path) -> None:
    """Prints what a command has written, a line each; of a directory of many images, how many there are."""
    for line in files_in(output):
        show(line)


def _check_free(output: Path) -> None:
    if output.exists():
        raise BadInput(f"{output} exists; choose another --output")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; exits with its code."""
    settle_streams()
    try:
        os.getcwd()
    except FileNotFoundError:
        _exit(2, "the current directory has been removed; change into another one")
    if logs.as_json():
        logs.install()
    try:
        app(arguments, prog_name="python -m flowpp")
    except ValidationError as error:
        _exit(2, describe(error))
    except (BadInput, BadImages, BadCheckpoint, BrokenVariable, BadRunDirectory) as error:
        _exit(2, str(error))
    except (UnsupportedLevel, tracing.TracingError) as error:
        _exit(2, str(error))
    except NotFinite as error:
        _exit(1, str(error))
    except TrainingError as error:
        _exit(2 if error.code == "bad_dataset" else 1, f"{error} ({error.code})")
    except (MemoryError, RuntimeError) as error:
        from flowpp.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _exit(1, "out of memory; try a smaller --batch-size")


def _exit(code: int, sentence: str) -> NoReturn:
    say(f"flowpp: {sentence}", logging.ERROR)
    sys.exit(code)


if __name__ == "__main__":
    main()
