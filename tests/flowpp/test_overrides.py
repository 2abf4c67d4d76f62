"""Changes of a preset on the command line, and the answer to each mistake."""

import pytest

from flowpp.names import meant
from flowpp.overrides import parse_overrides
from flowpp.presets import PRESETS, find_preset


def test_changes_belong_to_the_model_its_dequantizer_and_the_recipe() -> None:
    model, training = parse_overrides(
        [
            "model.filters=48",
            'model.flow=["squeeze"]',
            "model.dequantizer.blocks=1",
            'model.dequantizer={"kind": "uniform"}',
            "training.compile=false",
            "training.conditioner_precision=bfloat16",
            "training.seed=1",
            "training.seed=2",
        ]
    )
    assert model == {"filters": 48, "flow": ["squeeze"], "dequantizer": {"blocks": 1, "kind": "uniform"}}
    assert training == {"compile": False, "conditioner_precision": "bfloat16", "seed": 2}
    assert parse_overrides([]) == ({}, {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("training.learnign_rate=1", "training has no field 'learnign_rate'; did you mean learning_rate?"),
        ("model.fliters=1", "model has no field 'fliters'; did you mean filters?"),
        ("model.dequantizer.blcks=1", "did you mean blocks?"),
        ('model.dequantizer={"blcks": 1}', "did you mean blocks?"),
        ("model.dequantizer=1", "or a JSON object"),
        ("model.learning_rate=1", "did you mean training.learning_rate?"),
        ("training.filters=1", "did you mean model.filters?"),
        ("blocks=1", "did you mean model.blocks or model.dequantizer.blocks?"),
        ("training.zzz=1", "there are steps, batch_size"),
        ("optimizer.lr=1", "write model.NAME=VALUE"),
        ("training.steps", "write model.NAME=VALUE"),
        ("training.=1", "write model.NAME=VALUE"),
        ("=1", "write model.NAME=VALUE"),
        ("", "write model.NAME=VALUE"),
        ("model.width=16", "width comes from the images"),
    ],
)
def test_a_mistake_is_answered_with_what_would_be_right(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match="--set") as raised:
        parse_overrides([text])
    assert sentence in str(raised.value)
    assert f"--set {text}:" in str(raised.value)


@pytest.mark.parametrize(("name", "near"), [("smal", "small"), ("tiney", "tiny"), ("cifar-10", "cifar10")])
def test_an_unknown_preset_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown preset '{name}'; did you mean {near}"):
        find_preset(name)
    assert find_preset(near) is PRESETS[near]


def test_names_that_nothing_is_near_to_are_answered_with_all() -> None:
    assert meant("q", ["one", "two"]) == "there are one, two"
    assert meant("q", []) == ""
    assert meant("q", [str(number) for number in range(40)]).endswith("28, 29 and 10 more")
    assert meant("t" * 10**6, ["one"]) == "there are one"
