"""Training in several processes, started as users and workers start it: the same run as in one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from flowpp.checkpoint import verify
from flowpp.data import ImageSet
from flowpp.run_directory import RunDirectory
from tests.collector import ENDPOINT, Collector, collecting
from tests.waiting import PATIENCE_SECONDS, until

SCRIPT = Path(__file__).with_name("train_in_float64.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--shutdown-timeout", "60")


def command(
    directory: Path, *arguments: str, processes: int = 2, launcher: tuple[str, ...] = ("--standalone",)
) -> list:
    """Of a run in float64."""
    distributed = [*LAUNCHER, *launcher, f"--nproc-per-node={processes}"]
    start = distributed if processes > 1 or "--standalone" not in launcher else [sys.executable]
    return [*start, str(SCRIPT), "train", str(directory), *arguments]


def new_run(image_set: ImageSet, **training: object) -> list[str]:
    changes = {"training.steps": 12, "training.log_every": 1, "training.evaluation_every": 6, "model.dropout": 0}
    changes |= {"training.checkpoint_every": 6, "training.warmup_steps": 2}
    changes |= {f"training.{name}": value for name, value in training.items()}
    sets = [part for name, value in changes.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return ["--data", str(image_set.directory), "--preset", "tiny", *sets]


def run(*arguments: object, **settings: Any) -> None:
    command, environment = [str(argument) for argument in arguments], ENVIRONMENT | settings.get("environment", {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == settings.get("status", 0), done.stderr[-4000:]


def metrics(directory: Path) -> list[dict[str, float]]:
    rows = RunDirectory(directory).read_metrics()
    return [{name: value for name, value in row.items() if name not in ("time", "images_per_second")} for row in rows]


def assert_alike(one: Path, other: Path, tolerance: float) -> None:
    assert [row.keys() for row in metrics(one)] == [row.keys() for row in metrics(other)]
    for row, expected in zip(metrics(one), metrics(other), strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=0, abs=tolerance), (name, row["step"])
    found, expected = (verify(RunDirectory(run).checkpoints()[-1]).validation_quantiles for run in (one, other))
    assert found == pytest.approx(expected, rel=0, abs=tolerance), "of all images, whichever process scored them"


@pytest.fixture(scope="module")
def alone(image_set: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 12 steps."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    run(*command(directory, *new_run(image_set), processes=1))
    return directory


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with pytest.MonkeyPatch.context() as environment, collecting(environment) as collector:
        yield collector


@pytest.fixture(scope="module")
def both(image_set: ImageSet, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Path:
    """Two processes, the same steps."""
    directory = tmp_path_factory.mktemp("both") / "run"
    run(*command(directory, *new_run(image_set)), environment={ENDPOINT: collector.url})
    return directory


def test_two_processes_give_the_curve_of_one_within_1e_9(alone: Path, both: Path) -> None:
    assert len(metrics(both)) == 12
    assert_alike(both, alone, 1e-9)


def test_two_processes_give_the_weights_of_one(alone: Path, both: Path) -> None:
    one, other = (load_file(path / "checkpoints" / "step-00000012" / "ema.safetensors") for path in (alone, both))
    assert all((one[name] - other[name]).abs().max() < 1e-9 for name in one)


def test_the_files_are_written_once(both: Path) -> None:
    assert [path.name for path in RunDirectory(both).checkpoints()] == ["step-00000006", "step-00000012"]
    assert json.loads((both / "result.json").read_text())["status"] == "succeeded"
    for path in RunDirectory(both).checkpoints():
        verify(path)


def test_spans_are_sent_once(both: Path, collector: Collector) -> None:
    run = collector.one("training run")
    for name in ("evaluation", "checkpoint"):
        found = [(span.parent, span.attributes["flowpp.step"]) for span in collector.named(name)]
        assert found == [(run.id, 6), (run.id, 12)]


def test_micro_batches_add_up_to_the_batch(alone: Path, image_set: ImageSet, tmp_path: Path) -> None:
    run(*command(tmp_path / "run", *new_run(image_set, micro_batch_size=3), processes=1))
    assert_alike(tmp_path / "run", alone, 1e-9)


def test_micro_batches_add_up_in_several_processes_of_unequal_shares(
    alone: Path, image_set: ImageSet, tmp_path: Path
) -> None:
    run(*command(tmp_path / "run", *new_run(image_set, micro_batch_size=2), processes=3))
    assert_alike(tmp_path / "run", alone, 1e-9)


_GRADIENTS = """
import torch
from flowpp.learner import Learner
from flowpp.presets import resolve_model, resolve_training
from flowpp.processes import joined

with joined("cpu") as processes:
    training = resolve_training("tiny", {"num_processes": 2, "micro_batch_size": MICRO_BATCH})
    learner = Learner(resolve_model("tiny", {}, (3, 8, 8)), training, processes)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    learner.initialize(images)
    for _ in range(2):
        learner.take_step(images)
    gradients = [parameter.grad for parameter in learner.model.parameters() if parameter.requires_grad]
    own = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    print(f"{len(gradients)} gradients in {len(own)} buffers", flush=True)
    processes.leave()
"""


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_gradients_of_several_processes_are_no_copies_of_what_is_sent(micro_batch: int) -> None:
    code = _GRADIENTS.replace("MICRO_BATCH", str(micro_batch))
    launcher = [*LAUNCHER, "--standalone", "--nproc-per-node=2", "--no-python", sys.executable, "-c", code]
    done = subprocess.run(launcher, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.findall(r"\d+ gradients in (\d+) buffers", done.stdout) == ["1", "1"], done.stdout


def test_flips_decay_and_recomputed_couplings_are_the_same_in_two_processes(
    image_set: ImageSet, tmp_path: Path
) -> None:
    options = {"horizontal_flips": True, "weight_decay": 0.1, "activation_checkpointing": True, "micro_batch_size": 2}
    for processes in (1, 2):
        run(*command(tmp_path / str(processes), *new_run(image_set, **options), processes=processes))
    assert_alike(tmp_path / "2", tmp_path / "1", 1e-9)
    assert metrics(tmp_path / "1")[0]["horizontal_flips"] == 1


@pytest.mark.parametrize("then", [1, 2])
def test_a_stopped_run_goes_on_in_as_many_processes_bit_for_bit_and_in_others_within_rounding(
    alone: Path, both: Path, image_set: ImageSet, tmp_path: Path, then: int
) -> None:
    directory = tmp_path / "run"
    stop_after(3, command(directory, *new_run(image_set)), directory)
    assert json.loads((directory / "result.json").read_text())["status"] == "stopped"
    assert 3 <= len(metrics(directory)) < 12
    run(*command(directory, processes=then))
    if then == 2:
        assert metrics(directory) == metrics(both)
    assert_alike(directory, alone, 1e-9)


def stop_after(step: int, arguments: list[str], directory: Path) -> None:
    """SIGTERM to the launcher, when the step is in the metrics."""
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until(lambda: len(RunDirectory(directory).read_metrics()) >= step or process.poll() is not None)
        assert process.poll() is None, process.stderr and process.stderr.read().decode()[-3000:]
        process.terminate()
        process.communicate(timeout=PATIENCE_SECONDS)


def test_no_process_outlives_a_killed_launcher(image_set: ImageSet, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    arguments = command(directory, *new_run(image_set, steps=100_000, evaluation_every=100_000))
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        until(RunDirectory(directory).read_metrics)
        ranks = psutil.Process(launcher.pid).children(recursive=True)
        assert len(ranks) >= 2
        launcher.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_SECONDS)
    assert not alive


def test_a_killed_process_ends_the_run_without_a_result_and_it_can_be_taken_up(
    both: Path, image_set: ImageSet, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    arguments = command(directory, *new_run(image_set))
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        run_directory = RunDirectory(directory)
        until(lambda: len(run_directory.read_metrics()) >= 6 and run_directory.checkpoints())
        ranks = [process for process in psutil.Process(launcher.pid).children() if "train" in process.cmdline()]
        ranks[-1].kill()
        assert launcher.wait(PATIENCE_SECONDS) != 0
    result = directory / "result.json"
    assert not result.exists() or json.loads(result.read_text())["status"] == "stopped"
    run(*command(directory))
    assert metrics(directory) == metrics(both)


def test_two_nodes_are_two_launchers_that_meet(alone: Path, image_set: ImageSet, tmp_path: Path) -> None:
    directory, port = tmp_path / "run", free_port()
    nodes = []
    for rank in range(2):
        meeting = ("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}")
        arguments = command(directory, *new_run(image_set), processes=1, launcher=meeting)
        nodes.append(subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for node in nodes:
        _, errors = node.communicate(timeout=PATIENCE_SECONDS)
        assert node.returncode == 0, errors.decode()[-3000:]
    assert_alike(directory, alone, 1e-9)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_bad_input_ends_all_processes_with_a_sentence(image_set: ImageSet, tmp_path: Path) -> None:
    arguments = command(tmp_path / "run", "--data", str(image_set.directory), "--preset", "huge")
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "unknown preset 'huge'" in done.stderr
