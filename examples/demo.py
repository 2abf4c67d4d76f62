"""The whole story on real photographs, in minutes: train a small Flow++, score held-out images, draw samples.

    python -m examples.demo [--steps N] [--output demo_output]

Starts the service on this machine and speaks to it over HTTP only. Writes summary.json, training_curve.png and
samples.png, and leaves the service's data in data/ beside them until the next run.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from api.client import Client, ClientError, Job
from api.stack import Stack, StackError, exit_on_signals, lock
from api.watch import transfer, watch
from examples import photographs
from flowpp.data import encode_png

PRESET = "small"
HELD_OUT = 256
SAMPLES = 36


class DemoError(Exception):
    """The demonstration failed; the message says why."""


@dataclass(frozen=True)
class Summary:
    """What summary.json holds. Bits/dim are means over the same held-out images."""

    bits_per_dim: float
    standard_error: float
    png_bits_per_dim: float
    webp_lossless_bits_per_dim: float
    held_out_images: int
    preset: str
    steps: int
    training_images: int
    images_per_second: float
    training_seconds: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"trained {self.preset!r} for {self.steps} steps on {self.training_images} patches in "
            f"{self.training_seconds:.0f} s ({self.images_per_second:.0f} images/s)\n"
            f"held-out bits/dim: {self.bits_per_dim:.3f} ± {self.standard_error:.3f}; "
            f"PNG {self.png_bits_per_dim:.3f}, WebP lossless {self.webp_lossless_bits_per_dim:.3f}"
        )


def run(output: Path, steps: int | None, console: Console) -> Summary:
    """The demonstration. Raises `DemoError`, and what the client and the stack raise."""
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    data = output / "data"
    clear(data)
    console.print("starting the service ...")
    with Stack(data, port=0) as stack, stack.guard(), Client(stack.url) as client:
        console.print(f"it answers on {stack.url}")
        archive = photographs.write(output / "photographs.npz")
        with transfer(console, f"uploading {archive.name}") as progress:
            dataset = client.datasets.upload(archive, progress)
        console.print(f"uploaded {dataset.num_images} patches of photographs, {dataset.num_validation} held out")

        training = {} if steps is None else {"steps": steps}
        job = client.training_jobs.create(dataset=dataset.id, model={"preset": PRESET}, training=training)
        job = succeeded(watch(client, job.id, console))

        images = photographs.patches()[1][:HELD_OUT]
        console.print(f"scoring {len(images)} held-out patches, drawing {SAMPLES} samples ...")
        files = [(f"{index:04}.png", encode_png(image)) for index, image in enumerate(images)]
        scoring = client.likelihood_jobs.create(model=job.id, images=files)
        sampling = client.sampling_jobs.create(model=job.id, num_samples=SAMPLES, seed=0)
        score = succeeded(client.jobs.wait(scoring.id))
        succeeded(client.jobs.wait(sampling.id))
        client.jobs.download(sampling.id, "grid.png", output / "samples.png")
        client.jobs.download(job.id, "training_curve.png", output / "training_curve.png")
        metrics = [event.data for event in client.jobs.events(job.id) if event.type == "metrics"]
        console.print("stopping the service ...")
    assert score.result is not None
    assert job.started_at is not None
    assert job.finished_at is not None
    return Summary(
        bits_per_dim=score.result["bits_per_dim"],
        standard_error=score.result["standard_error"],
        png_bits_per_dim=float(photographs.png_bits_per_dim(images).mean()),
        webp_lossless_bits_per_dim=float(photographs.webp_bits_per_dim(images).mean()),
        held_out_images=len(images),
        preset=PRESET,
        steps=metrics[-1]["step"],
        training_images=dataset.num_images - dataset.num_validation - dataset.num_test,
        images_per_second=median(entry["images_per_second"] for entry in metrics if "images_per_second" in entry),
        training_seconds=job.finished_at - job.started_at,
        seconds=time.monotonic() - start,
    )


def clear(data: Path) -> None:
    """Empties the data directory of an earlier run; refused while a stack uses it."""
    with lock(data):
        for entry in data.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)


def succeeded(job: Job) -> Job:
    if job.status == "succeeded":
        return job
    reason = f"{job.error.message} ({job.error.code})" if job.error else "no reason given"
    raise DemoError(f"{job.type} job {job.id} {job.status}: {reason}")


def main() -> None:
    """Exit codes: 0 done, 1 failed (it says why), 130 stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the preset's")
    options = parser.parse_args()
    exit_on_signals()
    try:
        summary = run(options.output, options.steps, Console(highlight=False))
    except (DemoError, ClientError, StackError, OSError) as error:
        sys.exit(f"the demo failed: {error}")
    (options.output / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    print(f"\n{summary}\nwrote summary.json, training_curve.png and samples.png into {options.output}/")


if __name__ == "__main__":
    main()
