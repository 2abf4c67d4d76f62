"""Checkpoints: whole or not at all, and what does not verify is refused by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowpp.checkpoint import (
    EMA,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    BadCheckpoint,
    complete_checkpoints,
    describe_file,
    newest_complete,
    read_manifest,
    verify,
)
from flowpp.data import ImageSet
from flowpp.likelihood import Likelihood, likelihood, to_symbols
from flowpp.model import FlowPP
from flowpp.seeds import Stream, seed_of
from flowpp.weights import write_checkpoint


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A run with checkpoints at steps 10 and 20, to be spoilt."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000020"


def change_manifest(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Under a manifest that agrees with the changed file."""
    tensors = load_file(checkpoint / EMA)
    change(tensors)
    save_file(tensors, checkpoint / EMA)
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    change_manifest(checkpoint, files={**files, EMA: describe_file(checkpoint / EMA).model_dump()})


def test_a_manifest_says_what_the_checkpoint_is_of(checkpoint: Path, image_set: ImageSet) -> None:
    manifest = verify(checkpoint)
    assert (manifest.step, manifest.images_seen) == (20, 160)
    assert manifest.dataset_sha256 == image_set.sha256
    assert manifest.model.image_shape == image_set.shape
    assert manifest.training is not None
    assert manifest.files.keys() == {MODEL, EMA, OPTIMIZER}
    assert {"train_bits_per_dim", "validation_bits_per_dim"} <= manifest.metrics.keys()


def test_a_manifest_has_the_quantiles_of_the_bits_per_dim_whose_mean_it_has(
    checkpoint: Path, image_set: ImageSet
) -> None:
    manifest = verify(checkpoint)
    seed = seed_of(manifest.training.seed if manifest.training else 0, Stream.VALIDATION)
    estimates = np.concatenate(list(likelihood(FlowPP.load(checkpoint), image_set.validation, seed=seed)))
    scores = Likelihood(estimates, manifest.model.dimensions, 1, seed).bits_per_dim
    assert scores.mean() == pytest.approx(manifest.metrics["validation_bits_per_dim"], abs=1e-5)
    expected = np.quantile(scores, np.arange(101) / 100)
    np.testing.assert_allclose(manifest.validation_quantiles, expected, atol=1e-5)


def test_a_checkpoint_from_before_there_were_quantiles_loads_and_has_none(checkpoint: Path, tmp_path: Path) -> None:
    old = shutil.copytree(checkpoint, tmp_path / "old")
    manifest = json.loads((old / MANIFEST).read_text())
    del manifest["validation_quantiles"]
    (old / MANIFEST).write_text(json.dumps(manifest))
    assert verify(old).validation_quantiles is None
    FlowPP.load(old)


def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, image_set: ImageSet, checkpoint: Path) -> None:
    model = FlowPP.load(checkpoint)
    model.save(tmp_path / "saved")
    again = FlowPP.load(tmp_path / "saved")
    images = to_symbols(image_set.validation, model)
    expected = model.log_prob(images, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        again.log_prob(images, generator=torch.Generator().manual_seed(0)), expected, rtol=0, atol=0
    )
    assert not again.training
    assert read_manifest(tmp_path / "saved").files.keys() == {MODEL}


def test_the_moving_average_is_what_a_checkpoint_loads(checkpoint: Path) -> None:
    weights = FlowPP.load(checkpoint).state_dict()
    average = load_file(checkpoint / EMA)
    last = load_file(checkpoint / MODEL)
    assert all(torch.equal(weights[name], average[name]) for name in average)
    assert not all(torch.equal(last[name], average[name]) for name in average)


def test_loading_draws_no_random_numbers(checkpoint: Path) -> None:
    before = torch.get_rng_state()
    FlowPP.load(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_is_never_written_over(checkpoint: Path) -> None:
    with pytest.raises(FileExistsError):
        FlowPP.load(checkpoint).save(checkpoint)
    verify(checkpoint)


def test_a_failed_write_leaves_nothing(tmp_path: Path, checkpoint: Path) -> None:
    model = FlowPP.load(checkpoint)
    with pytest.raises(ValueError, match="step"):
        write_checkpoint(tmp_path / "new", {MODEL: model.state_dict()}, model=model.config, step=-1)
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


SPOILT = {
    "no directory": (shutil.rmtree, "there is no such directory"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "manifest.json"),
    "half a manifest": (lambda path: (path / MANIFEST).write_text('{"format": 1,'), "manifest.json is not a manifest"),
    "another format": (lambda path: change_manifest(path, format=2), "format: "),
    "an unknown field": (lambda path: change_manifest(path, colour="red"), "colour: "),
    "a file outside": (lambda path: change_manifest(path, files={"../x": {"bytes": 1, "sha256": "0" * 64}}), "files"),
    "no weights": (lambda path: change_manifest(path, files={}), "lists no model.safetensors"),
    "a missing file": (lambda path: (path / EMA).unlink(), "ema.safetensors is missing"),
    "a truncated file": (lambda path: (path / EMA).write_bytes(b"\0"), "ema.safetensors is damaged: it has 1 bytes"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_checkpoint_is_refused_by_name(checkpoint: Path, name: str) -> None:
    spoil, sentence = SPOILT[name]
    spoil(checkpoint)
    with pytest.raises(BadCheckpoint, match=sentence):
        read_manifest(checkpoint)
    with pytest.raises(BadCheckpoint, match=sentence):
        FlowPP.load(checkpoint)


def test_one_flipped_bit_is_found(checkpoint: Path) -> None:
    content = bytearray((checkpoint / EMA).read_bytes())
    content[-1] ^= 1
    (checkpoint / EMA).write_bytes(content)
    for read in (verify, FlowPP.load):
        with pytest.raises(BadCheckpoint, match="sha256"):
            read(checkpoint)


UNFIT = {
    "a missing tensor": (lambda tensors: tensors.popitem(), "lacks"),
    "an unknown tensor": (lambda tensors: tensors.update(strange=torch.zeros(1)), "holds strange"),
    "another shape": (lambda tensors: tensors.update({min(tensors): torch.zeros(3, 5)}), r"\[3, 5\]"),
    "another dtype": (lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].double()}), "float64"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_tensors_that_are_not_the_models_are_refused(checkpoint: Path, name: str) -> None:
    change, sentence = UNFIT[name]
    change_tensors(checkpoint, change)
    with pytest.raises(BadCheckpoint, match=f"ema.safetensors .*{sentence}"):
        FlowPP.load(checkpoint)


def test_the_newest_complete_checkpoint_is_the_newest_that_verifies(run: Path, checkpoint: Path) -> None:
    assert newest_complete(run) == checkpoint
    (checkpoint / OPTIMIZER).write_bytes(bytes((checkpoint / OPTIMIZER).stat().st_size))
    assert newest_complete(run) == run / "checkpoints" / "step-00000010"
    (run / "checkpoints" / "step-00000010" / MANIFEST).unlink()
    assert newest_complete(run) is None
    assert list(complete_checkpoints(run)) == [checkpoint]


def test_a_manifest_is_read_without_torch(checkpoint: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flowpp.checkpoint import verify; import flowpp.run_directory;"
        "print(verify(Path(sys.argv[1])).step, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["20", "False"]


def test_loading_a_model_does_not_load_the_compiler(checkpoint: Path) -> None:
    """Which takes as long as all else."""
    program = (
        "import sys; from flowpp import FlowPP; FlowPP.load(sys.argv[1]); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, checkpoint], check=True)
