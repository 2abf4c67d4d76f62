"""The benchmark of kernels: a column for each level that this machine supports."""

import pytest

from benchmarks import kernels
from tests.levels import levels_here


def test_each_part_is_measured_at_each_level_beside_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "REPETITIONS", 1)
    assert kernels.compared() == levels_here()
    header = kernels.header()
    assert [column for column in header if column.endswith(" forward")] == [
        f"{level} forward" for level in levels_here()
    ]
    for part in kernels.parts(8, 2, 2, 1):
        cells = kernels.row("tiny", 1, part)
        assert len(cells) == len(header)
        assert cells[0] == f"tiny: {part.name}"
        assert all(float(cell) > 0 for cell in cells[3 : 5 + 2 * len(levels_here())])
