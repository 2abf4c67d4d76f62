"""Checkpoints: whole or not at all, and what does not verify is refused by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from flowpp.learner import Learner
from flowpp.likelihood import Likelihood, likelihood, to_symbols
from flowpp.model import FlowPP
from flowpp.presets import PRESETS, resolve_model
from flowpp.processes import Processes
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


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@contextmanager
def surrounded(default: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("default", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_saved_is_loaded_in_its_dtype_under_any_default(
    checkpoint: Path, tmp_path: Path, dtype: torch.dtype, default: torch.dtype, device: str
) -> None:
    model = FlowPP.load(checkpoint).to(dtype)
    with surrounded(default, device):
        model.save(tmp_path / "saved")
        again = FlowPP.load(tmp_path / "saved")
    expected = model.state_dict()
    for name, value in again.state_dict().items():
        assert (value.dtype, value.device.type) == (dtype, "cpu")
        assert torch.equal(value, expected[name])
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(again.sample(2, seed=1), model.sample(2, seed=1))
    else:
        with pytest.raises(ValueError, match=r"convert the model by model.float\(\)"):
            again.sample(2, seed=1)
        assert torch.equal(again.float().sample(2, seed=1), model.float().sample(2, seed=1))


@pytest.mark.parametrize("default", DTYPES)
def test_a_model_made_under_another_default_is_loaded_under_ours(tmp_path: Path, default: torch.dtype) -> None:
    with surrounded(default, "cpu"):
        FlowPP("tiny").save(tmp_path / "saved")
    assert {value.dtype for value in FlowPP.load(tmp_path / "saved").state_dict().values()} == {default}


def test_a_float64_model_scores_the_same_after_it_was_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = FlowPP.load(checkpoint).double()
    model.save(tmp_path / "saved")
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    noise = model.draw_noise(3)
    assert torch.equal(
        FlowPP.load(tmp_path / "saved").log_prob(images, noise=noise), model.log_prob(images, noise=noise)
    )


@pytest.mark.parametrize("part", ["flow", "dequantizer"])
def test_a_model_of_two_dtypes_is_not_saved(checkpoint: Path, tmp_path: Path, part: str) -> None:
    model = FlowPP.load(checkpoint)
    getattr(model, part).double()
    with pytest.raises(ValueError, match="all weights have one dtype"):
        model.save(tmp_path / "saved")
    assert not list(tmp_path.glob("*saved*"))


def test_a_model_without_values_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = FlowPP("tiny")
    with pytest.raises(ValueError, match="meta device"):
        model.save(tmp_path / "saved")
    assert not list(tmp_path.glob("*saved*"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_weights_that_are_not_floating_point_are_refused(checkpoint: Path, dtype: torch.dtype) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.to(dtype) for name, value in tensors.items()})

    change_tensors(checkpoint, change)
    with pytest.raises(BadCheckpoint, match=f"ema.safetensors .*{dtype}.*floating-point"):
        FlowPP.load(checkpoint)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_run_has_the_dtype_of_its_files(
    image_set: ImageSet, tmp_path: Path, dtype: torch.dtype, default: torch.dtype
) -> None:
    """Weights, average and optimizer; its next step is that of the first run."""
    recipe, processes = PRESETS["tiny"].training, Processes(0, 1, torch.device("cpu"))
    model = resolve_model("tiny", {"dropout": 0.1}, image_set.shape)
    with surrounded(dtype, "cpu"):
        learner = Learner(model, recipe, processes)
        images = to_symbols(image_set.training[:8], learner.model)
        learner.initialize(images)
        learner.take_step(images)
        learner.save(tmp_path / "saved", metrics={}, unlogged={}, dataset_sha256="0" * 64)
        learner.take_step(images)
    with surrounded(default, "cpu"):
        resumed = Learner(model, recipe, processes)
        resumed.load(tmp_path / "saved")
        resumed.take_step(images)
    for module, other in ((resumed.model, learner.model), (resumed.ema, learner.ema)):
        for name, value in module.state_dict().items():
            assert value.dtype == dtype
            assert torch.equal(value, other.state_dict()[name])


def test_a_warm_start_keeps_the_dtype_of_the_run(image_set: ImageSet, checkpoint: Path, tmp_path: Path) -> None:
    FlowPP.load(checkpoint).double().save(tmp_path / "double")
    model = resolve_model("tiny", {"dropout": 0.1}, image_set.shape)
    learner = Learner(model, PRESETS["tiny"].training, Processes(0, 1, torch.device("cpu")))
    learner.start_from(tmp_path / "double")
    expected = FlowPP.load(checkpoint).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in learner.ema.state_dict().items())


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
