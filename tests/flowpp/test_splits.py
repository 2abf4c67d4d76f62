"""Names that indicate a split: recognized or refused at any depth, and words that only look like them ignored."""

import pytest

from flowpp.images import BadImages
from flowpp.splits import Part, parts_by_name

T, V, E = Part.TRAINING, Part.VALIDATION, Part.TEST


def parts(*names: str, count: int = 10) -> list[Part] | None:
    return parts_by_name(names, [count] * len(names))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("train/1.png; valid/1.png", [T, V]),
        ("training/1.png; validation/1.png", [T, V]),
        ("Train/1.png; Val/1.png", [T, V]),
        ("TRAIN/1.png; DEV/1.png", [T, V]),
        ("train/1.png; eval/1.png", [T, V]),
        ("train/1.png; evaluation/1.png; test/1.png", [T, V, E]),
        ("train/1.png; holdout/1.png", [T, V]),
        ("train/1.png; held_out/1.png", [T, V]),
        ("train/1.png; val/1.png; test/1.png", [T, V, E]),
        ("train2017/1.png; val2017/1.png; test2017/1.png", [T, V, E]),
        ("train_images/1.png; val_images/1.png", [T, V]),
        ("train-set/1.png; test-set/1.png", [T, E]),
        ("trainset/1.png; testset/1.png", [T, E]),
        ("training data (old)/1.png; testing/1.png", [T, E]),
        ("trainA/1.png; trainB/1.png; testA/1.png; testB/1.png", [T, T, E, E]),
        ("train/1.png; test-seen/1.png; test-unseen/1.png", [T, E, E]),
        ("x_train.npy; x_test.npy", [T, E]),
        ("XTrain.npy; XTest.npy", [T, E]),
        ("x_tr.npy; x_va.npy; x_te.npy", [T, V, E]),
        ("Xtr.npy; Xva.npy; Xte.npy", [T, V, E]),
        ("tr/1.png; te/1.png", [T, E]),
        ("tr/1.png; va/1.png; te/1.png", [T, V, E]),
        ("mytrain/1.png; mytest/1.png; mytest/2.png", [T, E, E]),
        ("Mnisttrain.npy; Mnisttest.npy", [T, E]),
        ("a/newtrain_1.png; a/newtrain_2.png; a/newval_3.png", [T, T, V]),
        ("traincats/1.png; testcats/1.png", [T, E]),
        ("train_images.npy; val_images.npy; test_images.npy", [T, V, E]),
        ("train-00000-of-00002.npy; train-00001-of-00002.npy; validation-00000-of-00001.npy", [T, T, V]),
        ("cifar10_train.npy; cifar10_test.npy", [T, E]),
        ("dataset/v1/train/a/1.png; dataset/v1/val/b/2.png", [T, V]),
        ("cat/train/1.png; cat/test/2.png; dog/train/3.png", [T, E, T]),
        ("images/train/1.png; other/val/2.png", [T, V]),
        ("train_1.png; train_2.png; test_1.png", [T, T, E]),
        ("test data/train/1.png; test data/val/1.png", [T, V]),
        ("data_batch_1; test_batch", [T, E]),
        ("train/fold1/1.png; train/fold2/1.png; test/fold1/1.png", [T, T, E]),
        # vehicles
        ("train/bus/1.png; train/train/2.png; test/bus/3.png; test/train/passenger_train_4.png", [T, T, E, E]),
        ("train/1.png; train/2.png", [T, T]),
        ("test/1.png", [E]),
        ("valid.npy", [V]),
    ],
)
def test_names_are_recognized(names: str, expected: list[Part]) -> None:
    assert parts(*names.split("; ")) == expected


@pytest.mark.parametrize(
    "names",
    [
        ["trainers/1.png", "boots/1.png"],
        ["latest/1.png", "contest/1.png", "attest/1.png"],
        ["valley/1.png", "invalid/1.png", "interval/1.png", "value/1.png"],
        ["strain/1.png", "restraint/1.png"],
        ["protest.npy", "greatest.npy"],
        ["fold/1.png", "scaffold2/1.png"],
        ["holder/1.png", "threshold/1.png"],
        ["cat/1.png", "dog/1.png"],
        ["arr_0.npy", "arr_1.npy"],
        ["tr/1.png", "de/1.png", "te/1.png"],  # languages
        ["trainer/1.png", "tester/1.png"],
        ["trainers/1.png", "testers/1.png"],
        ["restrain/1.png", "contest/1.png", "mytest/1.png"],
    ],
)
def test_words_that_only_contain_such_letters_are_no_split(names: list[str]) -> None:
    assert parts(*names) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/1.png", "val/1.png", "extra/1.png"], "extra/1.png: is in no part"),
        (["train/1.png", "test/1.png", "unlabeled/1.png"], "unlabeled/1.png: is in no part"),
        (["a/train/1.png", "b/1.png"], "b/1.png: is in no part"),
        (["images.npy", "test.npy"], "images.npy: is in no part"),
        (["fold0/1.png", "fold1/1.png"], "'fold0' does not say"),
        (["split_1.npy", "split_2.npy"], "'split_1' does not say"),
        (["trainval/1.png", "test/1.png"], "'trainval' does not say"),
        (["train_val/1.png", "test/1.png"], "'train_val' does not say"),
        (["train/1.png", "val/1.png", "eval/1.png"], "eval/1.png: could be for validation or for test"),
        (["train/valid/1.png", "train/train/1.png", "test/1.png"], "train/valid/1.png: its names indicate two parts"),
        (["train/test_1.png", "val/test_1.png"], "its names indicate two parts"),
        (["train/cat/1.png", "train/test/1.png"], "its names indicate two parts"),
        (["airplane/1.png", "train/1.png"], "airplane/1.png: is in no part"),
    ],
)
def test_names_that_do_not_say_it_of_all_images_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(BadImages) as caught:
        parts(*names)
    assert caught.value.code == "ambiguous_split"
    assert message in str(caught.value)
    assert "named train, validation and test" in str(caught.value)


def test_a_single_picture_called_test_is_no_split() -> None:
    assert parts("1.png", "2.png", "test.png", count=1) is None
    assert parts("cat/1.png", "cat/train.png", "dog/2.png", count=1) is None
    assert parts("test/1.png", "test/train.png", count=1) == [E, E]
    with pytest.raises(BadImages):
        parts("1.png", "2.png", "test_1.png", "test_2.png", count=1)
