"""Reshaping changes what it says and nothing else."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from traces.errors import TraceError
from traces.generators import generate
from traces.request_trace import Trace, TraceRequest
from traces.shaping import limit, mean_rate, poissonise, scale_rate, set_rate
from traces.statistics import index_of_dispersion

SECOND = 1_000_000_000
LAST_ARRIVAL_MAX_NS = 1 << 62  # 146 years
YEAR_NS = 366 * 86_400 * SECOND


@st.composite
def timed_traces(draw: st.DrawFn) -> Trace:
    """Two requests or more, over a microsecond or more and at most a year; some follow others."""
    arrivals = sorted(draw(st.lists(st.integers(0, 366 * 86_400 * SECOND), min_size=2, max_size=30)))
    arrivals[-1] = max(arrivals[-1], arrivals[0] + 1000)
    requests = tuple(
        TraceRequest(
            arrival_ns,
            draw(st.integers(1, 9)),
            draw(st.integers(1, 9)),
            content_ids=(index,),
            priority=index % 3,
            previous=draw(st.one_of(st.none(), st.integers(0, index - 1))) if index else None,
            gap_ns=draw(st.integers(0, SECOND)),
        )
        for index, arrival_ns in enumerate(arrivals)
    )
    return Trace("t", requests, content_block_size=16, source="here", notes=("a note",))


LATE_PAIR = Trace(
    "late",
    tuple(TraceRequest(YEAR_NS + after_ns, 1, 1) for after_ns in (0, 1000)),
    content_block_size=16,
    source="here",
)
"""Stretched to a low rate it would begin after more years than times can count."""


def rest(trace: Trace) -> list[tuple[object, ...]]:
    """Everything but the arrivals."""
    return [
        (r.num_prompt_tokens, r.num_output_tokens, r.content_ids, r.priority, r.previous, r.gap_ns)
        for r in trace.requests
    ]


def span_ns(trace: Trace) -> int:
    return trace.requests[-1].arrival_ns - trace.requests[0].arrival_ns


@settings(max_examples=40)
@given(trace=timed_traces(), factor=st.floats(0.01, 100))
def test_scaling_divides_the_time_axis_and_keeps_the_rest(trace: Trace, factor: float) -> None:
    scaled = scale_rate(trace, factor)
    assert rest(scaled) == rest(trace)
    assert (scaled.name, scaled.content_block_size, scaled.notes) == ("t", 16, ("a note",))
    for before, after in zip(trace.requests, scaled.requests, strict=True):
        # A nanosecond each for the start, for the span and for rounding down; rel is that of a float.
        assert after.arrival_ns == pytest.approx(before.arrival_ns / factor, rel=1e-12, abs=3)
    arrivals = [request.arrival_ns for request in scaled.requests]
    assert arrivals == sorted(arrivals)


@settings(max_examples=40)
@given(trace=timed_traces(), rate=st.floats(0.001, 1000))
@example(trace=LATE_PAIR, rate=0.001)
def test_setting_a_rate_gives_that_mean_rate(trace: Trace, rate: float) -> None:
    stretch = (len(trace.requests) - 1) * SECOND / rate / span_ns(trace)
    if trace.requests[-1].arrival_ns * stretch > LAST_ARRIVAL_MAX_NS:
        with pytest.raises(TraceError, match="146 years"):
            set_rate(trace, rate)
        return
    shaped = set_rate(trace, rate)
    assert rest(shaped) == rest(trace)
    assert span_ns(shaped) == pytest.approx((len(trace.requests) - 1) * SECOND / rate, rel=1e-9, abs=2)


def test_setting_the_rate_it_has_changes_nothing() -> None:
    trace = generate("azure-conv", num_requests=500, seed=1)
    rate = mean_rate(trace)
    assert rate is not None
    assert set_rate(trace, rate) == trace


@settings(max_examples=40)
@given(trace=timed_traces(), count=st.integers(1, 40))
def test_a_limited_trace_is_a_prefix_that_stands_alone(trace: Trace, count: int) -> None:
    limited = limit(trace, count)
    assert limited.requests == trace.requests[:count]
    assert all(r.previous is None or r.previous < len(limited.requests) for r in limited.requests)


@settings(max_examples=40)
@given(trace=timed_traces(), seed=st.integers(0, 1 << 32))
def test_the_poisson_twin_keeps_order_span_and_contents(trace: Trace, seed: int) -> None:
    twin = poissonise(trace, seed)
    assert rest(twin) == rest(trace)
    assert twin == poissonise(trace, seed)
    assert twin.requests[0].arrival_ns == trace.requests[0].arrival_ns
    assert span_ns(twin) == span_ns(trace)
    arrivals = [request.arrival_ns for request in twin.requests]
    assert arrivals == sorted(arrivals)


def test_the_poisson_twin_of_a_bursty_trace_has_no_bursts() -> None:
    bursty = generate("azure-code", num_requests=8000, seed=2)
    twin = poissonise(bursty, seed=3)
    for window_s in (1, 10):
        before = index_of_dispersion([r.arrival_ns for r in bursty.requests], window_s)
        after = index_of_dispersion([r.arrival_ns for r in twin.requests], window_s)
        assert before is not None
        assert before > 5
        # Of n windows the index has a standard deviation of (2 / n)^0.5: at most 0.09 for 250 windows.
        assert after == pytest.approx(1, abs=0.4)
    assert poissonise(bursty, seed=4).requests != twin.requests


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_impossible_rates_are_refused(value: float) -> None:
    trace = Trace("t", (TraceRequest(0, 1, 1), TraceRequest(5, 1, 1)))
    with pytest.raises(TraceError, match="must be a number above 0"):
        scale_rate(trace, value)
    with pytest.raises(TraceError, match="must be a number above 0"):
        set_rate(trace, value)


def test_edges() -> None:
    one = Trace("t", (TraceRequest(5, 1, 1),))
    assert set_rate(one, 3.0) == one
    assert scale_rate(one, 3.0) == one
    assert poissonise(one, 0) == one
    assert mean_rate(one) is None
    at_once = Trace("t", (TraceRequest(0, 1, 1), TraceRequest(0, 1, 1)))
    with pytest.raises(TraceError, match="all its requests arrive at the same time"):
        set_rate(at_once, 1.0)
    with pytest.raises(TraceError, match="must be 1 or more"):
        limit(one, 0)
    with pytest.raises(TraceError, match="146 years"):
        set_rate(Trace("t", (TraceRequest(0, 1, 1), TraceRequest(5, 1, 1))), 1e-12)
