"""The `flowpp` command as a user types it: what it prints, and its exit codes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from api.client import Client, Job
from api.stack import Stack
from worker.redis_server import free_port


def flowpp(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from api.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--port", "70000"], "65535"),
        (["datasets", "upload", "no-such-file.zip"], "no-such-file.zip"),
        (["train", "dataset_x", "--set", "filters=8"], "write model.NAME=VALUE"),
        (["train", "dataset_x", "--steps", "0"], "--steps"),
        (["likelihood", "job_x"], "give image files or --dataset"),
        (["jobs", "shew", "job_x"], "shew"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments: list[str], sentence: str) -> None:
    result = flowpp(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_no_service_is_a_sentence_and_exit_code_1() -> None:
    result = flowpp("jobs", "list", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert "Is `flowpp serve` running" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_refusal_of_the_service_is_its_sentence_and_exit_code_2(stack: Stack) -> None:
    result = flowpp("jobs", "show", "job_no_such", "--url", stack.url)
    assert result.returncode == 2
    assert "job_no_such" in result.stderr
    assert "Traceback" not in result.stderr


def test_upload_train_score_sample_and_download(stack: Stack, client: Client, archive: Path, tmp_path: Path) -> None:
    at = ("--url", stack.url)
    dataset = json.loads(flowpp("datasets", "upload", archive, *at).stdout)["id"]
    assert dataset in flowpp("datasets", "list", *at).stdout

    train = flowpp("train", dataset, "--preset", "tiny", "--set", "model.filters=4", *at)
    assert train.returncode == 0, train.stderr
    job = train.stdout.splitlines()[0]
    assert client.jobs.get(job).request["model"]["filters"] == 4
    assert "running" in train.stderr
    assert "bits/dim" in train.stderr

    score = flowpp("likelihood", job, "--dataset", dataset, *at)
    assert score.returncode == 0, score.stderr
    assert json.loads(score.stdout)["bits_per_dim"] > 0

    sample = flowpp("sample", job, "-n", "4", "-o", tmp_path / "grid.png", *at)
    assert sample.returncode == 0, sample.stderr
    with Image.open(tmp_path / "grid.png") as image:
        image.verify()

    checkpoint = flowpp("checkpoints", "list", *at).stdout.split()[0]
    assert flowpp("checkpoints", "download", checkpoint, "-o", tmp_path / "checkpoint", *at).returncode == 0
    assert (tmp_path / "checkpoint").stat().st_size > 1_000


def test_a_cancelled_job_is_listed_shown_and_watched_as_cancelled(stack: Stack, client: Client, trained: Job) -> None:
    at = ("--url", stack.url)
    dataset = trained.request["dataset"]
    started = flowpp("train", dataset, "--preset", "tiny", "--steps", "100000", "--no-watch", *at)
    job = started.stdout.strip()
    assert flowpp("jobs", "cancel", job, *at).returncode == 0
    watched = flowpp("jobs", "watch", job, *at)
    assert watched.returncode == 1
    assert f"job {job} is cancelled" in watched.stderr
    assert json.loads(flowpp("jobs", "show", job, *at).stdout)["status"] == "cancelled"
    assert f"{job}  training  cancelled" in flowpp("jobs", "list", "--status", "cancelled", *at).stdout


def test_a_job_is_paused_resumed_and_deleted_while_it_runs(stack: Stack, client: Client, trained: Job) -> None:
    at = ("--url", stack.url)
    warm = ("--resume-from", trained.id)
    dataset = trained.request["dataset"]
    job = flowpp("train", dataset, "--preset", "tiny", "--steps", "100000", *warm, "--no-watch", *at).stdout.strip()
    assert flowpp("jobs", "pause", job, *at).stdout.strip() in ("pausing", "paused")
    until(lambda: client.jobs.get(job).status == "paused")
    assert flowpp("jobs", "resume", job, *at).stdout.strip() == "queued"
    until(lambda: (progress := client.jobs.get(job).progress) is not None and progress.step > 0)
    assert flowpp("jobs", "delete", job, *at).returncode == 0
    until(lambda: job not in {each.id for each in client.jobs.list()})
    gone = flowpp("jobs", "show", job, *at)
    assert (gone.returncode, f"there is no job {job}" in gone.stderr) == (2, True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
