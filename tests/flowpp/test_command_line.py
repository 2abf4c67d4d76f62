"""The command line: the whole way from images to samples, stops on signals, and a sentence for bad input."""

import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flowpp.__main__ import main
from flowpp.checkpoint import EMA, newest_complete, read_manifest, verify
from flowpp.data import ImageSet, content_sha256, encode_png
from flowpp.model import FlowPP
from flowpp.presets import PRESETS
from flowpp.published import entries
from flowpp.recording import Recorder
from flowpp.run_directory import Result, RunDirectory, find_checkpoint
from tests.waiting import PATIENCE_SECONDS, until

COMMAND = (sys.executable, "-m", "flowpp")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(*arguments: object) -> int:
    """The exit code of a command, in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def read_result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def test_images_go_all_the_way(tmp_path: Path, images_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    changes = ("--set", "model.components=3", "--set", 'model.flow=["columns x1"]', "--set", "training.seed=5")
    assert run("train", directory, "--data", images_file, "--preset", "tiny", "--steps", 6, *changes) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["checkpoint"] == "step-00000006"
    config = RunDirectory(directory).config
    assert (config.model.components, config.model.flow, config.training.seed) == (3, ("columns x1",), 5)
    assert (directory / "training_curve.png").stat().st_size > 1000
    assert read_result(directory) == {
        "status": "succeeded",
        "step": 6,
        "code": None,
        "message": None,
        "best_checkpoint": "step-00000006",
        "last_checkpoint": "step-00000006",
    }

    folder = tmp_path / "folder"
    folder.mkdir()
    images = np.load(images_file)[:3]
    for index, image in enumerate(images):
        (folder / f"{index}.png").write_bytes(encode_png(image))
    scores = tmp_path / "scores"
    assert run("likelihood", directory, "--images", folder, "--output", scores, "--importance-samples", 2) == 0
    assert json.loads(capfd.readouterr().out) == json.loads((scores / "likelihood.json").read_text())
    assert [row.split(",")[0] for row in (scores / "likelihood.csv").read_text().split()[1:]] == [
        "0.png",
        "1.png",
        "2.png",
    ]

    latents, decoded = tmp_path / "latents.npz", tmp_path / "decoded"
    files = [part for index in range(3) for part in ("--images", folder / f"{index}.png")]
    assert run("encode", newest_complete(directory), *files, "--output", latents) == 0
    assert run("decode", directory, latents, "--output", decoded) == 0
    with np.load(decoded / "samples.npz") as arrays, np.load(latents) as encoded:
        np.testing.assert_array_equal(arrays["images"], images)
        assert encoded["names"].tolist() == ["0.png", "1.png", "2.png"]

    samples = tmp_path / "samples"
    assert run("sample", directory, "-n", 5, "--temperature", 0.7, "--output", samples) == 0
    assert sorted(path.name for path in samples.iterdir()) == ["grid.png", "png", "samples.npz"]
    assert len(list((samples / "png").iterdir())) == 5


def test_a_bits_map_and_a_gradient_are_written_with_their_pictures(
    tmp_path: Path, finished_run: Path, images_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores, slope = tmp_path / "scores", tmp_path / "gradient"
    assert run("likelihood", finished_run, "--images", images_file, "--bits-map", "--output", scores) == 0
    summary = json.loads(capfd.readouterr().out)
    assert (scores / "bits_map.png").stat().st_size > 1000
    with np.load(scores / "bits_map.npz") as arrays:
        assert arrays["bits"].shape == np.load(images_file).shape
        assert arrays["bits"].mean() == pytest.approx(summary["bits_per_dim"], rel=1e-5)
    assert summary["checkpoint_sha256"] == read_manifest(find_checkpoint(finished_run)).files[EMA].sha256
    assert summary["dataset_sha256"] == content_sha256(np.load(images_file))

    assert run("gradient", finished_run, "--images", images_file, "--output", slope) == 0
    assert (slope / "gradient.png").stat().st_size > 1000
    with np.load(slope / "gradient.npz") as arrays:
        assert np.isfinite(arrays["gradient"]).all()


def test_an_interpolation_begins_and_ends_with_its_images(
    tmp_path: Path, finished_run: Path, images_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ends = np.load(images_file)[[4, 1]]
    for name, image in zip("ab", ends, strict=True):
        (tmp_path / f"{name}.png").write_bytes(encode_png(image))
    files = ("--images", tmp_path / "a.png", "--images", tmp_path / "b.png")
    assert run("interpolate", finished_run, *files, "-n", 5, "--output", tmp_path / "between") == 0
    with np.load(tmp_path / "between" / "samples.npz") as arrays:
        assert len(arrays["images"]) == 5
        np.testing.assert_array_equal(arrays["images"][[0, -1]], ends)
    assert run("interpolate", finished_run, *files[:2], "--output", tmp_path / "none") == 2
    assert "gave 1 images; interpolation is between two" in capfd.readouterr().err


def test_the_authors_weights_are_imported_whole_or_not_at_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arrays = {name: np.full(entry.shape, 0.5, np.float32) for entry in entries("cifar10") for name in entry.names}
    np.savez_compressed(tmp_path / "weights.npz", **arrays)
    del arrays["Norm/norm0/g"]
    np.savez_compressed(tmp_path / "short.npz", **arrays)
    imported, short = tmp_path / "imported", tmp_path / "short"
    assert run("import", tmp_path / "weights.npz", "--preset", "cifar10", "--output", imported) == 0
    verify(imported)
    assert FlowPP.load(imported).config == PRESETS["cifar10"].model
    assert run("import", tmp_path / "short.npz", "--preset", "cifar10", "--output", short) == 2
    assert "1 missing: Norm/norm0/g" in " ".join(capfd.readouterr().err.split())
    assert not short.exists()
    assert run("import", tmp_path / "none.npz", "--preset", "cifar10", "--output", short) == 2


def test_the_validation_split_of_a_set_is_scored_alone(
    tmp_path: Path, finished_run: Path, image_set: ImageSet, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ("--images", image_set.directory, "--output", tmp_path / "scores")
    assert run("likelihood", finished_run, *where, "--split", "validation") == 0
    assert json.loads(capfd.readouterr().out)["num_images"] == image_set.num_validation


def test_a_finished_run_succeeds_again_and_says_that_nothing_is_left(
    tmp_path: Path, finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(finished_run, tmp_path / "run")
    assert run("train", directory) == 0
    output = capfd.readouterr()
    assert f"the run in {directory} has finished its 20 steps, so that there is nothing to train" in output.err
    assert output.out == ""
    assert read_result(directory)["status"] == "succeeded"
    assert read_result(directory)["step"] == 20


def started(directory: Path, images_file: Path, **streams: int) -> subprocess.Popen[bytes]:
    """A long run that has taken some steps."""
    never = ("checkpoint_every", "evaluation_every", "sample_every")
    sets = [part for name in never for part in ("--set", f"training.{name}=100000")]
    changes = ("--steps", "100000", "--set", "training.warmup_steps=0", *sets)
    process = subprocess.Popen(
        [*COMMAND, "train", directory, "--data", images_file, "--preset", "tiny", *changes], env=ENVIRONMENT, **streams
    )
    until(lambda: (directory / "metrics.jsonl").exists() or process.poll() is not None)
    assert process.poll() is None
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_from_there(
    number: signal.Signals, status: int, tmp_path: Path, images_file: Path
) -> None:
    directory = tmp_path / "run"
    process = started(directory, images_file, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process.send_signal(number)
    _, sentence = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == status
    result = read_result(directory)
    assert result["status"] == "stopped"
    assert result["step"] == RunDirectory(directory).read_metrics()[-1]["step"] > 0
    assert result["last_checkpoint"] == f"step-{result['step']:08d}"
    assert f"stopped at step {result['step']}; the last checkpoint is step-" in sentence.decode()
    assert "starts at the first step, with new weights" in sentence.decode()

    again = subprocess.Popen([*COMMAND, "train", directory], env=ENVIRONMENT, stdout=subprocess.PIPE)
    assert again.stdout is not None
    assert json.loads(again.stdout.readline())["step"] == result["step"] + 1
    again.send_signal(number)
    again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == status
    steps = [row["step"] for row in RunDirectory(directory).read_metrics()]
    assert steps == list(range(1, read_result(directory)["step"] + 1))


def test_a_run_that_ends_before_its_first_checkpoint_says_so() -> None:
    stopped = Recorder(result=Result(status="stopped", step=0))
    assert stopped.sentence == "stopped at step 0; there is no checkpoint yet"


def test_a_full_disk_under_its_output_does_not_end_a_run(tmp_path: Path, images_file: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        process = started(tmp_path / "run", images_file, stdout=full.fileno(), stderr=full.fileno())
        run = RunDirectory(tmp_path / "run")
        until(lambda: len(run.read_metrics()) >= 20 or process.poll() is not None)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)
    assert read_result(tmp_path / "run")["status"] == "stopped"


def test_on_a_terminal_a_bar_shows_steps_speed_and_bits_per_dim(tmp_path: Path, images_file: Path) -> None:
    leader, terminal = pty.openpty()
    arguments = ("train", tmp_path / "run", "--data", images_file, "--preset", "tiny", "--steps", "4")
    process = subprocess.Popen([*COMMAND, *arguments], env={**ENVIRONMENT, "TERM": "xterm"}, stdout=terminal)
    assert process.wait(PATIENCE_SECONDS) == 0
    os.close(terminal)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(leader, 100_000).decode())
    os.close(leader)
    for part in ("step 4/4", "images/s", "train ", "validation "):
        assert part in shown
    assert re.search(r"\d:\d\d elapsed, +[-\d:]+ left", shown)


COMMANDS = ("train", "likelihood", "gradient", "sample", "interpolate", "import", "encode", "decode")


def test_help_names_every_command_and_preset(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capfd.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert run("train", "--help") == 0
    shown = "".join(capfd.readouterr().out.split())  # the names are long, and wrapped
    assert all(name in shown for name in PRESETS)


def test_bad_input_gets_one_sentence_and_exit_code_2(
    tmp_path: Path, finished_run: Path, images_file: Path, image_set: ImageSet, capfd: pytest.CaptureFixture[str]
) -> None:
    new, output = tmp_path / "new", ("--output", tmp_path / "output")
    empty, text, wide = tmp_path / "empty", tmp_path / "text.png", tmp_path / "wide.npy"
    empty.mkdir()
    text.write_text("no image")
    np.save(wide, np.zeros((4, 8, 16, 3), np.uint8))
    begin = ("train", new, "--data", images_file, "--preset", "tiny")
    score, draw = ("likelihood", finished_run, *output, "--images"), ("sample", finished_run, *output)
    cases = {
        ("train", new): "holds no run to go on with",
        ("train", new, "--steps", 3): "need --data",
        ("train", finished_run, "--data", images_file): "holds a run already",
        (*begin, "--preset", "huge"): "unknown preset 'huge'; there are cifar10, imagenet32",
        (*begin, "--steps", 0): "steps: input should be greater than or equal to 1, not 0",
        (*begin, "--set", "training.learning_rate=NaN"): "learning_rate: input should be a finite number",
        (*begin, "--set", "training.learning_rate=-1"): "learning_rate: input should be greater than 0, not -1",
        (*begin, "--set", "model.filters=1e9"): "filters: ",
        (*begin, "--preset", "tny"): "unknown preset 'tny'; did you mean tiny?",
        (*begin, "--set", "model.colour=red"): "model has no field 'colour'; there are bits, filters",
        (*begin, "--set", "model.height=16"): "height comes from the images",
        (*begin, "--set", "filters=3"): "--set filters=3: did you mean model.filters?",
        (*begin, "--set", "model.filters"): "--set model.filters: write model.NAME=VALUE",
        (*begin, "--set", "model.dequantizer=3", "--set", "model.dequantizer.blocks=1"): "or a JSON object",
        (*begin, "--set", 'model.flow=["squeeze", "squeeze", "squeeze", "squeeze"]'): "needs an even height and width",
        (*begin, "--resume-from", empty): "is no checkpoint",
        (*begin, "--device", "gpu"): "'gpu' is not one of",
        ("train", new, "--data", tmp_path / "none", "--preset", "tiny"): "no such file or folder",
        ("train", new, "--data", empty, "--preset", "tiny"): "no images",
        ("train", new, "--data", text, "--preset", "tiny"): "is not an image of a known kind",
        (*score, wide): "16 pixels wide and 8 high; the model takes RGB, 8 pixels wide and 8 high",
        (*score, text): "is not an image of a known kind",
        (*score, tmp_path / "none.png"): "no such file",
        (*score, images_file, "--importance-samples", 65_537): "should be less than or equal to 65536",
        (*score, images_file, "--split", "half"): "'half' is not one of",
        (*begin, "--test-as-validation"): "the images bring no test part; leave test_as_validation out",
        ("train", new, "--test-as-validation"): "and need --data",
        ("likelihood", empty, "--images", images_file, *output): "is no checkpoint",
        ("likelihood", finished_run, "--images", images_file, "--output", empty): "choose another --output",
        (*draw, "-n", 0): "Input should be greater than or equal to 1",
        (*draw, "-n", 1_000_000): "Input should be less than or equal to 100000",
        (*draw, "--temperature", -1): "'--temperature': Input should be greater than or equal to 0",
        (*draw, "--temperature", "nan"): "temperature",
        (*draw, "--seed", -1): "'--seed': Input should be greater than or equal to 0",
        ("sample", tmp_path / "none"): "no such directory",
        ("decode", finished_run, wide, *output): "is no .npz file",
        ("encode", finished_run, "--images", wide, *output): "16 pixels wide",
    }  # fmt: skip
    for arguments, sentence in cases.items():
        code, shown = run(*arguments), capfd.readouterr()
        assert code == 2, arguments
        assert sentence in " ".join(shown.err.split()), (arguments, shown.err)
        assert "Traceback" not in shown.err
        assert shown.out == ""
        assert not new.exists(), arguments
        assert not (tmp_path / "output").exists(), arguments


def test_a_run_whose_configuration_does_not_hold_fails_with_a_result(
    tmp_path: Path, finished_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((finished_run / "config.json").read_text())
    for name, change, code, sentence in (
        ("a", {"training": {**config["training"], "batch_size": 0}}, "internal", "training.batch_size"),
        ("b", {"data": str(tmp_path / "gone")}, "bad_dataset", "no such file"),
    ):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps({**config, **change}))
        assert run("train", directory) == 2
        assert sentence in capfd.readouterr().err
        result = read_result(directory)
        assert (result["status"], result["code"]) == ("failed", code)
        assert sentence in result["message"]


def test_a_diverged_model_ends_commands_with_a_sentence(
    tmp_path: Path, finished_run: Path, images_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = FlowPP.load(finished_run / "checkpoints" / "step-00000020").requires_grad_(False)
    next(model.flow.parameters()).fill_(math.nan)
    broken = tmp_path / "broken"
    model.save(broken)
    for command, output in (
        (("likelihood", broken, "--images", images_file), "scores"),
        (("sample", broken, "-n", 2), "samples"),
        (("encode", broken, "--images", images_file), "latents.npz"),
        (("gradient", broken, "--images", images_file), "gradient"),
    ):
        assert run(*command, "--output", tmp_path / output) == 1
        said = capfd.readouterr().err
        assert "not finite (NaN or infinite): the model has diverged" in said
        assert "Traceback" not in said
    assert json.loads((tmp_path / "scores" / "likelihood.json").read_text())["bits_per_dim"] is None
    assert not (tmp_path / "samples").exists()
