"""`make bench-likelihood` on a tiny model: each of its tables has what was measured."""

import numpy as np
import pytest

from benchmarks.likelihood import bound, precision, round_trips, solver
from examples import photographs
from flowpp import FlowPP
from flowpp.likelihood import to_symbols


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.ascontiguousarray(photographs.patches()[0][:8])


@pytest.fixture(scope="module")
def model(images: np.ndarray) -> FlowPP:
    model = FlowPP("tiny")
    model.initialize(to_symbols(images, model))
    return model.eval()


def cells(part: str) -> list[list[str]]:
    """Of the rows of its table."""
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_float32_is_measured_against_float64(model: FlowPP, images: np.ndarray) -> None:
    [[name, n, largest, mean]] = cells(precision({"tiny": model}, [images]))
    assert (name, n) == ("tiny", "8")
    assert 0 < float(mean) <= float(largest) < 1e-4


def test_encode_and_decode_are_measured_by_what_they_change(model: FlowPP, images: np.ndarray) -> None:
    [[name, n, changed, shift, speed]] = cells(round_trips({"tiny": model}, [images]))
    assert (name, n, changed) == ("tiny", "8", "0")
    assert 0 < float(shift) < 1 / 16
    assert float(speed) > 0


def test_the_inverse_is_counted_also_of_models_that_invert_by_kernels(model: FlowPP) -> None:
    [[name, mean, most, bisections, most_bisections]] = cells(solver({"tiny": model}, [4]))
    assert name == "tiny"
    assert 1 <= float(mean) <= int(most) < float(bisections) <= int(most_bisections) <= 200


def test_the_bound_is_told_for_each_number_of_samples(model: FlowPP, images: np.ndarray) -> None:
    rows = cells(bound(model, images))
    assert [row[0] for row in rows] == ["1", "4", "16", "64"]
    assert float(rows[-1][1]) < float(rows[0][1]), "more samples, a tighter bound"
    assert all(float(row[-1]) > 0 for row in rows)
