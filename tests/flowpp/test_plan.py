"""Plans: what a run leaves open is chosen so that it fits its memory, and stays as it was chosen."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowpp.checkpoint import newest_complete, read_manifest
from flowpp.config import ModelConfig, TrainingConfig
from flowpp.data import ImageSet
from flowpp.durable import replace_file
from flowpp.memory import estimate, micro_batch
from flowpp.model import FlowPP
from flowpp.native import kernels
from flowpp.plan import SURE, DoesNotFit, choose, fits
from flowpp.presets import PRESETS, resolve_model, resolve_training
from flowpp.run_directory import CONFIG, RunDirectory, TrainingError
from flowpp.training import train
from tests.flowpp.test_training import assert_same_run

CIFAR10 = PRESETS["cifar10"].model
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


PLAIN = {"compile": False}
"""A run without kernels takes the same memory on every machine, with a compiler or without one."""


def recipe(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"batch_size": 64, "init_batch_size": 2, **changes})


def room(images: int, **changes: Any) -> float:
    """Bytes that so many images of a forward pass surely fit into, and no more."""
    training = recipe(micro_batch_size=images, **changes)
    return estimate(CIFAR10, training).at(images) / SURE


def chosen(training: TrainingConfig, available: float) -> tuple[int, bool | None]:
    plan = choose(CIFAR10, training, available)
    return micro_batch(plan), plan.activation_checkpointing


def test_the_whole_share_passes_at_once_where_it_exactly_fits() -> None:
    plan = choose(CIFAR10, recipe(), room(64))
    assert plan == recipe(activation_checkpointing=False)
    assert chosen(recipe(), room(64) - 2) == (32, False)


def test_passes_are_as_few_as_fit_and_of_as_many_images_each() -> None:
    assert chosen(recipe(), room(32)) == (32, False)
    assert chosen(recipe(), room(31)) == (22, False)
    assert chosen(recipe(batch_size=128, num_processes=2), room(31)) == (22, False)


def test_couplings_are_computed_anew_only_where_not_one_image_fits_otherwise() -> None:
    assert chosen(recipe(), room(1)) == (1, False)
    images, recomputed = chosen(recipe(), room(1) - 2)
    assert recomputed
    assert images > 1
    assert chosen(recipe(), room(1, activation_checkpointing=True)) == (1, True)


def test_what_fits_by_the_estimate_alone_is_better_than_nothing() -> None:
    least = SURE * room(1, activation_checkpointing=True)
    assert chosen(recipe(), least) == (1, True)
    with pytest.raises(DoesNotFit, match="not even one image fits: choose a smaller model"):
        choose(CIFAR10, recipe(), least - 2)


def test_what_is_stated_is_kept_and_only_the_rest_chosen() -> None:
    assert chosen(recipe(micro_batch_size=8), room(8)) == (8, False)
    assert chosen(recipe(micro_batch_size=8), room(7)) == (8, True)
    assert chosen(recipe(activation_checkpointing=True), room(64)) == (64, True)
    assert chosen(recipe(activation_checkpointing=False), room(7)) == (7, False)
    with pytest.raises(DoesNotFit, match="activation_checkpointing would make room for"):
        choose(CIFAR10, recipe(activation_checkpointing=False), SURE * room(1) - 2)
    with pytest.raises(DoesNotFit, match=r"64 images a forward pass take .*training.micro_batch_size \d+ would fit"):
        choose(CIFAR10, recipe(micro_batch_size=64), SURE * room(4))


def test_what_leaves_nothing_open_is_taken_or_refused_by_the_estimate() -> None:
    stated = recipe(micro_batch_size=8, activation_checkpointing=False)
    assert choose(CIFAR10, stated, SURE * room(8)) == stated
    with pytest.raises(DoesNotFit, match=r"training.micro_batch_size 7 would fit"):
        choose(CIFAR10, stated, SURE * room(8) - 2)


def test_memory_that_the_user_gives_bounds_the_plan_and_is_named() -> None:
    gib = room(5) / 2**30
    assert chosen(recipe(memory_gib=gib), 2**40) == (5, False)
    assert chosen(recipe(memory_gib=1000), room(5)) == (5, False)
    with pytest.raises(DoesNotFit, match=r"of 0.5 GiB that training.memory_gib allows"):
        choose(CIFAR10, recipe(memory_gib=0.5), 2**40)


def test_an_initialization_that_does_not_fit_is_named() -> None:
    with pytest.raises(DoesNotFit, match=r"training.init_batch_size 4,096 is too large: choose a smaller one"):
        choose(CIFAR10, recipe(init_batch_size=4096), room(2))


def test_what_was_chosen_fits_whatever_there_is() -> None:
    for model in (PRESETS["small"].model, CIFAR10):
        for cuda in (False, True):
            for gib in (1, 1.5, 2, 3, 5, 8, 13):
                try:
                    plan = choose(model, recipe(batch_size=500), gib * 2**30, cuda=cuda)
                except DoesNotFit:
                    assert gib < 8
                    continue
                assert fits(model, plan, gib * 2**30, cuda=cuda)


@pytest.mark.parametrize("heads", [3, 4], ids=["with a kernel", "without"])
def test_the_estimate_counts_what_attention_keeps_under_dropout(heads: int) -> None:
    model = resolve_model("small", {"filters": 48, "heads": heads, "dropout": 0.2}, (3, 32, 32))
    flow = FlowPP(model).train()
    flow.fuse(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in flow.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        flow.training_loss(images, noise=flow.draw_noise(16), dropout_seed=1)
    size = sum(x.untyped_storage().nbytes() for x in kept.values()) / 16
    compiled = kernels(torch.float32) is not None
    ratio = estimate(model, resolve_training("small", {"compile": compiled})).per_image / size
    assert 0.97 < ratio < (1.03 if compiled else 1.15)


WIDE = {"filters": 96, "heads": 4, "blocks": 4, "components": 8}


def wide_run(directory: Path, images: Path, **training: Any) -> list[str]:
    """The command of one step of a model that takes one or two MiB an image, the same with and without kernels."""
    steps = PLAIN | {"steps": 1, "warmup_steps": 0, "init_batch_size": 4, "evaluation_images": 2, "sample_every": 10}
    sets = {f"model.{name}": value for name, value in WIDE.items()}
    sets |= {f"training.{name}": value for name, value in {**steps, **training}.items()}
    changes = [part for name, value in sets.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return ["-m", "flowpp", "train", str(directory), "--data", str(images), "--preset", "tiny", *changes]


def within(limit: int, arguments: list[str]) -> tuple[int, str]:
    """Status and stderr of a process whose data may take no more than `limit` bytes."""

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, *arguments]
    done = subprocess.run(command, preexec_fn=bounded, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def test_a_run_that_would_take_more_than_a_real_limit_is_planned_to_fit_into_it(
    images_file: Path, tmp_path: Path
) -> None:
    limit = 2**30
    whole = {"micro_batch_size": 800, "activation_checkpointing": False}
    status, said = within(limit, wide_run(tmp_path / "whole", images_file, batch_size=800, **whole))
    assert status == 1
    assert "out of memory on cpu: 800 images a forward pass take about 1.7 GiB, of 1.1 GiB there are" in said
    status, said = within(limit, wide_run(tmp_path / "planned", images_file, batch_size=800))
    assert status == 0, said
    # a process has taken 0.1 GiB of its GiB, more or less, when it plans
    assert re.search(r"; 267 images a forward pass: 0\.8 GiB of 1\.[01] GiB\n", said), said
    assert recorded(tmp_path / "planned") == (267, False)


def recorded(directory: Path) -> tuple[int | None, bool | None]:
    """The plan in the newest checkpoint of a run."""
    newest = newest_complete(directory)
    assert newest is not None
    training = read_manifest(newest).training
    assert training is not None
    return training.micro_batch_size, training.activation_checkpointing


def test_all_processes_have_the_plan_of_the_one_with_the_least_memory(images_file: Path, tmp_path: Path) -> None:
    begin = wide_run(tmp_path / "run", images_file, batch_size=520)
    limited = f'if [ $LOCAL_RANK = 1 ]; then ulimit -d {800 * 1024}; fi; exec {sys.executable} "$@"'
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "bash", "-c"]
    done = subprocess.run(
        [sys.executable, *launcher, limited, "flowpp", *begin],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "130 images a forward pass: 0.5 GiB of 0.8 GiB" in done.stderr
    assert recorded(tmp_path / "run") == (130, False)


@pytest.fixture(scope="module")
def dropped(image_set: ImageSet) -> ModelConfig:
    """A model whose dropout depends on the images of a pass. Each image adds to the memory that it takes."""
    return resolve_model("tiny", {"dropout": 0.1, "blocks": 24}, image_set.shape)


def planned(model: ModelConfig, images: int) -> TrainingConfig:
    """A recipe with just the memory for so many images a forward pass."""
    training = resolve_training("tiny", PLAIN)
    several = training.model_copy(update={"micro_batch_size": images})
    return training.model_copy(update={"memory_gib": estimate(model, several).at(images) / SURE / 2**30})


def notes(directory: Path, steps: int | None = None, **run: Any) -> str:
    """What a run says, to its end or until it has taken so many steps."""
    events = []
    for event in train(directory, stop=lambda: steps is not None and len(events) + 1 >= steps, **run):
        events.append(event)
    return "; ".join(event.note for event in events if event.note)


def give(directory: Path, memory_gib: float | None) -> None:
    """From now on the run has other memory."""
    config = RunDirectory(directory).config
    other = config.model_copy(update={"training": config.training.model_copy(update={"memory_gib": memory_gib})})
    replace_file(directory / CONFIG, other.model_dump_json().encode())


def test_a_resumed_run_keeps_its_plan_bit_for_bit_where_there_is_more_memory(
    dropped: ModelConfig, image_set: ImageSet, tmp_path: Path
) -> None:
    run: dict[str, Any] = {"model": dropped, "training": planned(dropped, 3), "images": image_set}
    assert "3 images a forward pass" in notes(tmp_path / "whole", **run)
    notes(tmp_path / "stopped", steps=7, **run)
    give(tmp_path / "stopped", None)
    assert "goes on from step-00000007; 3 images a forward pass" in notes(tmp_path / "stopped")
    assert recorded(tmp_path / "stopped") == (3, False)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_plan_that_does_not_fit_any_more_is_made_anew_said_and_recorded(
    dropped: ModelConfig, image_set: ImageSet, tmp_path: Path
) -> None:
    notes(tmp_path, steps=7, model=dropped, training=resolve_training("tiny", PLAIN), images=image_set)
    assert recorded(tmp_path) == (None, False)
    give(tmp_path, planned(dropped, 2).memory_gib)
    give(tmp_path, SURE * (RunDirectory(tmp_path).config.training.memory_gib or 0))
    said = notes(tmp_path)
    assert "does not fit any more, 8 images a forward pass: " in said
    assert "from here on, 2 images a forward pass" in said
    assert recorded(tmp_path) == (2, False)


def test_a_warm_start_is_planned_anew(dropped: ModelConfig, image_set: ImageSet, tmp_path: Path) -> None:
    run: dict[str, Any] = {"model": dropped, "images": image_set}
    notes(tmp_path / "first", steps=2, training=planned(dropped, 3), **run)
    start = newest_complete(tmp_path / "first")
    notes(tmp_path / "second", steps=2, training=resolve_training("tiny", PLAIN), resume_from=start, **run)
    assert recorded(tmp_path / "second") == (None, False)


def test_a_run_that_no_plan_makes_fit_fails_before_its_first_step_with_what_to_choose(
    dropped: ModelConfig, image_set: ImageSet, tmp_path: Path
) -> None:
    training = resolve_training("tiny", {"memory_gib": 0.1})
    with pytest.raises(TrainingError, match=r"of 0.1 GiB that training.memory_gib allows; not even one") as caught:
        notes(tmp_path, model=dropped, training=training, images=image_set)
    assert caught.value.code == "out_of_memory"


def test_a_recipe_that_leaves_nothing_open_is_not_held_up_by_an_estimate(
    dropped: ModelConfig, image_set: ImageSet, tmp_path: Path
) -> None:
    stated = {"memory_gib": 0.1, "micro_batch_size": 3, "activation_checkpointing": True}
    said = notes(tmp_path, steps=2, model=dropped, training=resolve_training("tiny", stated), images=image_set)
    assert "a forward pass" not in said
    assert recorded(tmp_path) == (3, True)
