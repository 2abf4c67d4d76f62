"""`make bench-scale` at a tiny size: it measures all that it says, without torch, simulating what is like the true."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.simulated_workers import result
from flowpp.likelihood import Likelihood
from worker.jobs import Job
from worker.record_images import in_record


def test_it_grows_and_says_what_it_cost(tmp_path: Path) -> None:
    before = results.RESULTS.read_bytes()
    command = [sys.executable, "-m", "benchmarks.scale", "--sizes", "40", "--repeats", "3", "--dry-run"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert results.RESULTS.read_bytes() == before
    lines = [line for line in ran.stdout.splitlines() if line.startswith("| ") and not line.startswith("|  |")]
    rows = dict(line.strip("| ").rsplit(" | ", 1) for line in lines)
    assert rows["list, status=failed, of which there is none, ms"].count(" / ") == 1
    for name in (
        "training jobs: create, ms",
        "likelihood requests/s answered to 32 clients",
        "Redis: kB a training job of 100 steps",
        "Redis: kB a likelihood job",
        "events/s written, 8 at once",
        "events/s read over SSE, one client, told before",
        "reaper's pass where nothing is to be done, ms",
        "reaper: ms to delete an expired job",
        "Redis: MB of append-only file",
    ):
        assert float(rows[name].partition(" / ")[0].replace(",", "")) > 0, name


def test_a_simulated_result_has_the_fields_of_a_true_one() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    plan = {"checkpoint": "ckpt_1", "images": in_record(images, ["a", "b"])}
    fields = {"id": "job_1", "type": "likelihood", "status": "running", "created_at": 0, "max_attempts": 1}
    simulated = result(Job(**fields, request={}, plan=plan))
    true = Likelihood(np.zeros((2, 6)), 192, 1, 0)
    also = {"checkpoint", "images", "cold_start_seconds"}
    assert simulated.keys() == true.summary().keys() | also
    assert simulated["split"].keys() == true.split().keys()
    assert simulated["images"][0].keys() == next(iter(true.rows(["a", "b"]))).keys()
