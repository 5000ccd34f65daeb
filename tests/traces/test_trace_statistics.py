"""Statistics against plain definitions, numpy and scipy."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from traces.format_statistics import format_statistics
from traces.generators import generate
from traces.prefix_statistics import lru_hit_ratio, prefix_statistics
from traces.reader import read_trace
from traces.request_trace import Trace, TraceRequest
from traces.statistics import (
    QUANTILES,
    index_of_dispersion,
    interarrival_cv,
    length_statistics,
    spearman,
    trace_statistics,
)

SECOND = 1_000_000_000


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=3, max_size=60))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ours = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-9)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60))
def test_length_statistics_are_numpys(lengths: list[int]) -> None:
    ours = length_statistics(lengths)
    assert ours.mean == pytest.approx(np.mean(lengths))
    assert (ours.minimum, ours.maximum) == (min(lengths), max(lengths))
    assert [value for _, value in ours.quantiles] == pytest.approx(list(np.quantile(lengths, QUANTILES)))


@given(st.lists(st.integers(0, 3 * SECOND), min_size=3, max_size=80), st.sampled_from([1, 3]))
def test_arrival_statistics_follow_their_definitions(gaps: list[int], window_s: int) -> None:
    arrivals = [0, *accumulate(gaps)]
    if sum(gaps):
        assert interarrival_cv(arrivals) == pytest.approx(np.std(gaps) / np.mean(gaps))
    num_windows = arrivals[-1] // (window_s * SECOND)
    counts = [0] * num_windows
    for arrival in arrivals:
        if arrival < num_windows * window_s * SECOND:
            counts[arrival // (window_s * SECOND)] += 1
    expected = np.var(counts) / np.mean(counts) if num_windows >= 2 else None
    assert index_of_dispersion(arrivals, window_s) == (None if expected is None else pytest.approx(expected))


def naive_lru_hits(contents: Sequence[Sequence[int]], capacity: int) -> int:
    """Least recently used, as a plain list."""
    cache: list[int] = []
    hits = 0
    for content_ids in contents:
        for block in content_ids:
            if block in cache:
                hits += 1
                cache.remove(block)
            cache.append(block)
            del cache[:-capacity]
    return hits


@given(st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=20), st.integers(1, 14))
def test_lru_is_the_plain_one_and_grows_to_the_infinite_cache(contents: list[list[int]], capacity: int) -> None:
    total = sum(map(len, contents))
    ratio = lru_hit_ratio(contents, capacity)
    assert ratio * total == pytest.approx(naive_lru_hits(contents, capacity))
    trace = Trace("t", tuple(TraceRequest(0, 1, 1, content_ids=tuple(ids)) for ids in contents), content_block_size=1)
    prefix = prefix_statistics(trace, capacities_blocks=(capacity, 13))
    if not total:
        assert prefix is None
        return
    assert prefix is not None
    assert prefix.lru_hit_ratios[0] == (capacity, ratio)
    assert ratio <= prefix.infinite_hit_ratio + 1e-12
    # There are 13 different blocks, so a cache of 13 never evicts.
    assert prefix.lru_hit_ratios[1][1] == pytest.approx(prefix.infinite_hit_ratio)


def test_sessions_are_counted_as_trees() -> None:
    previous = (None, 0, None, 1, 0, None)
    trace = Trace("t", tuple(TraceRequest(i, 1, 1, previous=before) for i, before in enumerate(previous)))
    sessions = trace_statistics(trace).sessions
    assert (sessions.num_sessions, sessions.num_follow_ups, sessions.num_turns_max) == (1, 3, 4)
    assert sessions.num_turns_mean == 2.0


def test_a_single_request_has_statistics_and_text() -> None:
    statistics = trace_statistics(Trace("one", (TraceRequest(0, 7, 3),)))
    assert statistics.rate_rps is None
    assert statistics.interarrival_cv is None
    assert {value for _, value in statistics.dispersion} == {None}
    assert any("not known: the trace has no content" in line for line in format_statistics(statistics))


@pytest.mark.parametrize("name", ["azure-conv", "mooncake-conv"])
def test_the_text_shows_the_figures_in_narrow_lines(name: str) -> None:
    statistics = trace_statistics(generate(name, num_requests=2000, seed=1))
    lines = format_statistics(statistics)
    text = "\n".join(lines)
    assert "2,000 in" in text
    assert f"{statistics.output_tokens.mean:,.1f}" in text
    if statistics.prefix:
        assert f"{statistics.prefix.infinite_hit_ratio:.3f}" in text
        assert f"{statistics.sessions.num_follow_ups:,} follow-ups" in text
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("name", "cv", "dispersion", "prompts", "outputs"),
    [
        (
            "azure2023_code.csv",
            13.2,
            (13.2, 32, 72, 124, 164, 138),
            (75, 578, 1469, 2744, 7303, 7436),
            (6, 9, 13, 24, 90, 251),
        ),
        (
            "azure2023_conv.csv",
            1.09,
            (1.39, 1.97, 3.86, 8.87, 16.1, 56),
            (181, 396, 1020, 1189, 4083, 4142),
            (41, 85, 129, 395, 451, 601),
        ),
    ],
)
def test_recorded_traces_have_their_published_statistics(
    data_file: Callable[[str], Path],
    name: str,
    cv: float,
    dispersion: tuple[float, ...],
    prompts: tuple[float, ...],
    outputs: tuple[float, ...],
) -> None:
    statistics = trace_statistics(read_trace(data_file(f"traces/{name}"), seed=0))
    # The published figures have two or three digits, lengths whole tokens.
    assert statistics.interarrival_cv == pytest.approx(cv, rel=0.01)
    assert [value for _, value in statistics.dispersion] == pytest.approx(dispersion, rel=0.02)
    assert [value for _, value in statistics.prompt_tokens.quantiles] == pytest.approx(prompts, abs=1)
    assert [value for _, value in statistics.output_tokens.quantiles] == pytest.approx(outputs, abs=1)
