"""The demonstration, cut short: what it writes, and that it leaves nothing running."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.waiting import PATIENCE_SECONDS


def start(output: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.demo", "--output", str(output), "--steps", str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_demo_writes_its_summary_curve_and_samples_and_can_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        with start(tmp_path, steps=6) as demo:
            text, _ = demo.communicate(timeout=PATIENCE_SECONDS)
        assert demo.returncode == 0, text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["held_out_images"] == 256
    assert summary["standard_error"] > 0
    assert 2 < summary["webp_lossless_bits_per_dim"] < summary["png_bits_per_dim"] < 5
    for name in ("training_curve.png", "samples.png"):
        with Image.open(tmp_path / name) as image:
            image.verify()
    assert f"{summary['bits_per_dim']:.3f}" in text
    assert max(map(len, text.splitlines())) < 160, "lines that do not fit a log"


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_interrupted_stops_everything(tmp_path: Path, signum: int, status: int) -> None:
    with start(tmp_path, steps=100_000) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("running"):
                break
        family = psutil.Process(demo.pid).children(recursive=True)
        time.sleep(1)
        demo.send_signal(signum)
        assert demo.wait(PATIENCE_SECONDS) == status
    assert len(family) >= 4
    assert psutil.wait_procs(family, timeout=PATIENCE_SECONDS)[1] == []


def test_a_failed_training_job_is_told_and_exits_1(tmp_path: Path) -> None:
    with start(tmp_path, steps=0) as demo:
        text, _ = demo.communicate(timeout=PATIENCE_SECONDS)
    assert demo.returncode == 1
    assert "the demo failed" in text
    assert "steps" in text
    assert "Traceback" not in text
