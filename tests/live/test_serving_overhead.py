"""The benchmark of the engine works, at a size that takes no time."""

import asyncio

import pytest

from benchmarks.serving_overhead import measure_in_a_row, measure_paced, measure_streams


@pytest.mark.parametrize("single_process", [True, False])
def test_streams_are_all_read_and_timed(single_process: bool) -> None:
    result = asyncio.run(measure_streams(40, 20, single_process))
    assert result.num_tokens == 800
    assert result.num_steps >= 20
    assert 0 <= result.longest_gap_ms_median <= result.longest_gap_ms_max
    assert result.core_us_per_step > 0


def test_paced_streams_wait_at_least_a_step() -> None:
    result = asyncio.run(measure_paced(10, 10, 5.0))
    assert result.longest_gap_ms_median >= 5.0
    assert result.wall_s >= 0.05


def test_a_thousand_requests_in_a_row_leave_nothing() -> None:
    result = asyncio.run(measure_in_a_row(1_000, single_process=True))
    assert result.num_blocks_in_use_after == 0
    assert result.num_unfinished_after == 0
