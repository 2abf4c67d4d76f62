"""Likelihoods of image sets: the model's own numbers, whatever the batches."""

import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowpp.arguments import NotFinite
from flowpp.config import ModelConfig
from flowpp.data import BadImages, ImageSet
from flowpp.likelihood import COLUMNS, Likelihood, bits_maps, estimate, gradients, likelihood, to_symbols
from flowpp.model import FlowPP, WeightTerms
from flowpp.presets import PRESETS
from flowpp.seeds import seed_of


@pytest.fixture(scope="session")
def model(finished_run: Path) -> FlowPP:
    """In float64, so that rounding does not hide what is not equal."""
    return FlowPP.load(finished_run / "checkpoints" / "step-00000020").double()


@pytest.fixture
def images(image_set: ImageSet) -> np.ndarray:
    return image_set.validation[:7]


def estimates(model: FlowPP, images: np.ndarray, **arguments: int) -> Likelihood:
    found = np.concatenate(list(likelihood(model, images, **arguments)))
    return Likelihood(found, model.config.dimensions, arguments.get("importance_samples", 1), arguments.get("seed", 0))


def scored(model: FlowPP, images: np.ndarray, **arguments: int) -> np.ndarray:
    return estimates(model, images, **arguments).log_prob


@pytest.mark.parametrize("importance_samples", [1, 5])
def test_the_numbers_do_not_depend_on_the_batches(model: FlowPP, images: np.ndarray, importance_samples: int) -> None:
    expected = estimates(model, images, importance_samples=importance_samples).estimates
    for batch_size in (1, 3, 12):
        found = estimates(model, images, importance_samples=importance_samples, batch_size=batch_size).estimates
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_seed_repeats_and_another_one_does_not(model: FlowPP, images: np.ndarray) -> None:
    one = scored(model, images, seed=1)
    np.testing.assert_array_equal(scored(model, images, seed=1), one)
    assert (scored(model, images, seed=2) != one).all()


def test_equal_images_in_one_set_meet_different_noise(model: FlowPP, images: np.ndarray) -> None:
    twice = scored(model, images[[0, 0]])
    assert twice[0] != twice[1]


def test_the_bound_is_the_mean_of_weights_under_the_images_own_noise(model: FlowPP, images: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(seed_of(3, 0))
    with torch.no_grad():
        symbols = to_symbols(images[:1], model)
        weights = [model.log_weight(symbols, model.draw_noise(1, generator)).item() for _ in range(4)]
    expected = np.logaddexp.reduce(weights) - math.log(4)
    assert scored(model, images[:1], importance_samples=4, seed=3)[0] == pytest.approx(expected, rel=1e-12)


def test_rows_of_different_requests_share_a_batch_and_keep_their_numbers(model: FlowPP, images: np.ndarray) -> None:
    seeds = [seed_of(1, 0), seed_of(8, 0)]
    together = estimate(model, images[:2], seeds, importance_samples=2)
    alone = [estimate(model, images[i : i + 1], seeds[i : i + 1], importance_samples=2)[0] for i in range(2)]
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_the_bound_rises_with_samples(model: FlowPP, image_set: ImageSet) -> None:
    images = image_set.validation
    one, many = (scored(model, images, importance_samples=k).mean() for k in (1, 16))
    assert many > one


def test_images_of_another_shape_are_refused(model: FlowPP, images: np.ndarray) -> None:
    with pytest.raises(BadImages, match="4 pixels wide and 8 high; the model takes RGB, 8 pixels wide"):
        scored(model, images[:, :, :4])


def test_a_model_of_fewer_bits_sees_the_upper_ones(images: np.ndarray) -> None:
    config = PRESETS["tiny"].model.model_copy(update={"bits": 3, "height": 8, "width": 8})
    symbols = to_symbols(images, FlowPP(config))
    np.testing.assert_array_equal(symbols.numpy().transpose(0, 2, 3, 1), images // 32)


def test_bits_per_dim_mean_and_standard_error_are_those_of_the_images(tmp_path: Path) -> None:
    log_prob = np.array([-100.0, -140.0, -120.0])
    table = np.column_stack([log_prob, [1, 2, 1.5], [1, 0, 0.5], log_prob - 10, [6, 7, 8], [3, 2, 1]])
    result = Likelihood(table, dimensions=48, importance_samples=2, seed=0)
    bits = [100 / math.log(2) / 48, 140 / math.log(2) / 48, 120 / math.log(2) / 48]
    np.testing.assert_allclose(result.bits_per_dim, bits)
    assert result.mean == pytest.approx(bits[2])
    assert result.standard_error == pytest.approx((bits[1] - bits[2]) / math.sqrt(3))
    assert Likelihood(table[:1], 48, 1, 0).standard_error is None

    result.write(tmp_path, ["a.png", "b,c.png", "\udce4.png"])
    assert json.loads((tmp_path / "likelihood.json").read_text())["bits_per_dim"] == result.mean
    with (tmp_path / "likelihood.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a.png", "b,c.png", "\\udce4.png"]
    assert [float(row["log_likelihood"]) for row in rows] == log_prob.tolist()
    assert [float(row["effective_sample_size"]) for row in rows] == [1, 2, 1.5]
    assert float(rows[0]["bits_per_dim_standard_error"]) == pytest.approx(1 / math.log(2) / 48)
    with Image.open(tmp_path / "likelihood.png") as plot:
        assert plot.format == "PNG"


def test_effective_sample_size_and_standard_error_are_those_of_the_weights(model: FlowPP, images: np.ndarray) -> None:
    k = 6
    generator = torch.Generator().manual_seed(seed_of(3, 0))
    with torch.no_grad():
        symbols = to_symbols(images[:1], model)
        logs = np.array([model.log_weight(symbols, model.draw_noise(1, generator)).item() for _ in range(k)])
    weights = np.exp(logs - logs.max())
    found = estimates(model, images[:1], importance_samples=k, seed=3)
    assert found.column("effective_sample_size")[0] == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.column("standard_error")[0] == pytest.approx(weights.std(ddof=1) / math.sqrt(k) / weights.mean())


def test_the_standard_error_is_the_spread_over_other_noise() -> None:
    torch.manual_seed(0)
    # few dimensions, so that the weights are narrow
    tiny = PRESETS["tiny"].model.model_dump()
    config = tiny | {"height": 1, "width": 2, "channels": 1, "flow": ("columns x2",)}
    model = FlowPP(ModelConfig(**config)).double().eval()
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 2, 1), np.uint8)
    model.initialize(to_symbols(images, model))
    runs = [estimates(model, images[:1], importance_samples=4096, batch_size=4096, seed=seed) for seed in range(40)]
    assert np.mean([run.column("effective_sample_size")[0] for run in runs]) > 100, "else it tells little"
    spread = np.std([run.log_prob[0] for run in runs], ddof=1)
    claimed = np.sqrt(np.mean([run.column("standard_error")[0] ** 2 for run in runs]))
    assert spread / 1.5 < claimed < 1.5 * spread


def test_one_importance_sample_claims_no_standard_error(model: FlowPP, images: np.ndarray) -> None:
    found = estimates(model, images)
    assert np.isnan(found.column("standard_error")).all()
    assert found.sampling_standard_error is None
    assert json.loads(json.dumps(found.summary(), allow_nan=False))["sampling_standard_error"] is None
    assert next(iter(found.rows(["a"] * len(images))))["bits_per_dim_standard_error"] is None


@pytest.mark.parametrize("importance_samples", [1, 5])
def test_the_split_sums_to_the_bits_per_dim(model: FlowPP, images: np.ndarray, importance_samples: int) -> None:
    found = estimates(model, images, importance_samples=importance_samples)
    split = found.split()
    assert split.keys() == {"prior", "log_det", "dequantizer", "importance"}
    assert sum(split.values()) == pytest.approx(found.mean, abs=1e-12)
    assert (split["importance"] == 0) == (importance_samples == 1) or abs(split["importance"]) < 1e-12


def test_the_parts_are_those_of_the_model(model: FlowPP, images: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(seed_of(0, 0))
    with torch.no_grad():
        terms = model.weight_terms(to_symbols(images[:1], model), model.draw_noise(1, generator))
    found = estimates(model, images[:1])
    parts = [found.column(name)[0] for name in ("prior", "log_det", "dequantizer")]
    np.testing.assert_allclose(parts, [term.item() for term in terms], rtol=1e-12)


@pytest.mark.parametrize("importance_samples", [100, 1000])
def test_memory_does_not_grow_with_the_importance_samples(
    model: FlowPP, images: np.ndarray, importance_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    weight_terms = model.weight_terms

    def observed(symbols: torch.Tensor, noise: torch.Tensor) -> WeightTerms:
        lengths.append(len(noise))
        return weight_terms(symbols, noise)

    monkeypatch.setattr(model, "weight_terms", observed)
    scored(model, images[:2], importance_samples=importance_samples, batch_size=16)
    assert max(lengths) == 16
    assert sum(lengths) == 2 * importance_samples


def test_a_bits_map_sums_to_the_images_bits(model: FlowPP, images: np.ndarray) -> None:
    maps = np.concatenate(list(bits_maps(model, images, seed=4)))
    assert maps.shape == images.shape
    bits_per_dim = maps.astype(np.float64).reshape(len(images), -1).mean(1)
    np.testing.assert_allclose(bits_per_dim, estimates(model, images, seed=4).bits_per_dim, rtol=1e-6)


def test_the_gradient_is_that_of_log_density_by_differences(model: FlowPP, images: np.ndarray) -> None:
    found = np.concatenate(list(gradients(model, images[:1], seed=4)))
    assert found.shape == (1, *images.shape[1:])
    generator = torch.Generator().manual_seed(seed_of(4, 0))
    with torch.no_grad():
        v = model.dequantize(to_symbols(images[:1], model), model.draw_noise(1, generator))
        for c, h, w in ((0, 0, 0), (2, 5, 3), (1, 7, 7)):
            step = torch.zeros_like(v)
            step[0, c, h, w] = 1e-5
            difference = (model.log_density(v + step) - model.log_density(v - step)).item() / 2e-5
            assert found[0, h, w, c] == pytest.approx(difference, rel=1e-4, abs=1e-6)


def refuse(constant: str) -> None:
    raise ValueError(constant)


@pytest.mark.parametrize("importance_samples", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", [1, 3])
def test_likelihoods_that_are_not_finite_are_null_in_the_files(
    tmp_path: Path, value: float, importance_samples: int, share: int
) -> None:
    """The first image has them, or all three."""
    estimates = np.full((3, 6), -100.0)
    estimates[:, COLUMNS.index("effective_sample_size")] = 1
    estimates[:, COLUMNS.index("standard_error")] = 0.1 if importance_samples > 1 else math.nan
    estimates[:share] = value
    scored = Likelihood(estimates, 192, importance_samples, 0)
    with pytest.raises(NotFinite, match=f"{share} of 3 images are not finite"):
        scored.check_finite()
    scored.write(tmp_path, ["a", "b", "c"])
    summary = json.loads((tmp_path / "likelihood.json").read_text(), parse_constant=refuse)
    assert (summary["bits_per_dim"], summary["log_likelihood"], summary["split"]["prior"]) == (None, None, None)
    assert summary["num_images"] == 3
    rows = list(csv.DictReader((tmp_path / "likelihood.csv").read_text().splitlines()))
    assert [row["log_likelihood"] for row in rows] == [""] * share + ["-100.0"] * (3 - share)
    assert json.loads(json.dumps(list(scored.rows(["a", "b", "c"]))), parse_constant=refuse)[0]["bits_per_dim"] is None


def test_a_diverged_model_scores_nan_and_says_so(model: FlowPP, images: np.ndarray) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.flow.parameters()).fill_(math.nan)
    estimates = np.concatenate(list(likelihood(broken, images)))
    with pytest.raises(NotFinite, match=r"are not finite .*: the model has diverged"):
        Likelihood(estimates, 192, 1, 0).check_finite()
    Likelihood(
        np.concatenate(list(likelihood(model, images))), 192, 1, 0
    ).check_finite()  # a NaN standard error is none
    for broken_maps in (bits_maps(broken, images), gradients(broken, images)):
        with pytest.raises(NotFinite):
            list(broken_maps)
