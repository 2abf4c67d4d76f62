"""`make bench-operations`, the part on Redis's durability, at a tiny size."""

from benchmarks.operations import MODES, durability


def test_each_durability_is_measured_and_only_without_a_file_a_killed_redis_loses_jobs() -> None:
    rows = [line.strip("| ").split(" | ") for line in durability(20).splitlines()[2:]]
    assert [row[0] for row in rows] == list(MODES)
    assert [row[-1] for row in rows] == ["0 of 40", "0 of 40", "0 of 40", "40 of 40"]
    for row in rows:
        assert all(float(cell.replace(",", "")) > 0 for cell in row[1:-1])
