"""The pace of an attempt."""

from worker.pace import Pace


def test_the_end_is_estimated_by_the_time_of_the_attempts_own_steps() -> None:
    now = 1_000.0
    pace = Pace(100, lambda: now)
    assert pace.at(40).estimated_finish_at is None, "nothing is measured yet"
    now += 30
    assert pace.at(40).estimated_finish_at is None
    progress = pace.at(50)  # 3 s a step, evaluations and all
    assert (progress.step, progress.percent_done, progress.estimated_finish_at) == (50, 50, now + 150)
    now += 10
    assert pace.at(60).estimated_finish_at == now + 80
    assert pace.at(100).estimated_finish_at == now


def test_a_clock_that_goes_back_estimates_nothing() -> None:
    times = iter([1_000.0, 990.0])
    pace = Pace(100, lambda: next(times))
    pace.at(0)
    assert pace.at(10).estimated_finish_at is None
