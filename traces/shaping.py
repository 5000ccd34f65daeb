"""Reshaping a trace: its rate, its length, its burstiness. Pure functions; lengths and content stay.

A session's ``gap_ns`` is a user's think time: it does not shrink when the rate grows.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from traces.columns import requests_from_columns
from traces.errors import TraceError
from traces.request_trace import Trace

_NANOSECONDS_PER_SECOND = 1_000_000_000
_SPAN_NS_MAX = 1 << 62  # times must stay well inside signed 64-bit integers


def mean_rate(trace: Trace) -> float | None:
    """Requests per second from the first arrival to the last; None where there is no time between them."""
    if len(trace.requests) < 2:
        return None
    span_ns = trace.requests[-1].arrival_ns - trace.requests[0].arrival_ns
    return (len(trace.requests) - 1) * _NANOSECONDS_PER_SECOND / span_ns if span_ns else None


def scale_rate(trace: Trace, factor: float) -> Trace:
    """The trace with arrivals ``factor`` times as dense. Raises TraceError unless 0 < factor < infinity."""
    if not (math.isfinite(factor) and factor > 0):
        raise TraceError(f"the rate scale is {factor:g}, but must be a number above 0")
    return _with_span(trace, _span_ns(trace) / factor)


def set_rate(trace: Trace, requests_per_second: float) -> Trace:
    """The trace with its time axis scaled so that the mean rate from first to last arrival is as given.

    A single request stays as it is. Raises TraceError for a rate that is not above 0, and for a trace
    whose requests all arrive at once.
    """
    if not (math.isfinite(requests_per_second) and requests_per_second > 0):
        raise TraceError(f"the rate is {requests_per_second:g} requests/s, but must be a number above 0")
    if len(trace.requests) < 2:
        return trace
    if not _span_ns(trace):
        raise TraceError(
            f"the rate of {trace.name!r} cannot be set: all its requests arrive at the same time, "
            f"but two or more times are needed"
        )
    return _with_span(trace, (len(trace.requests) - 1) * _NANOSECONDS_PER_SECOND / requests_per_second)


def limit(trace: Trace, count: int) -> Trace:
    """The first ``count`` requests, or all where there are fewer. Raises TraceError for a count below 1."""
    if count < 1:
        raise TraceError(f"the limit is {count} requests, but must be 1 or more")
    if count >= len(trace.requests):
        return trace
    # A request follows only earlier ones, so what is kept never points at what is not.
    return replace(trace, requests=trace.requests[:count])


def poissonise(trace: Trace, seed: int) -> Trace:
    """The burst-free twin: the same requests in the same order over the same span, as a Poisson process.

    Given its number of arrivals, a Poisson process has them uniform over the span: these are drawn by
    ``seed``. The first and the last request keep their times.
    """
    if len(trace.requests) < 3:
        return trace
    random = Random(seed)
    start_ns, span_ns = trace.requests[0].arrival_ns, _span_ns(trace)
    inner = sorted(start_ns + int(random.random() * span_ns) for _ in range(len(trace.requests) - 2))
    note = f"arrivals were replaced by a Poisson process of the same rate, with seed {seed}"
    return _with_arrivals(replace(trace, notes=(*trace.notes, note)), [start_ns, *inner, start_ns + span_ns])


def _span_ns(trace: Trace) -> int:
    return trace.requests[-1].arrival_ns - trace.requests[0].arrival_ns if trace.requests else 0


def _with_span(trace: Trace, new_span_ns: float) -> Trace:
    """Scale the time axis so that first and last arrival end ``new_span_ns`` apart."""
    span_ns = _span_ns(trace)
    if not span_ns:
        return trace
    if new_span_ns * (trace.requests[-1].arrival_ns / span_ns) > _SPAN_NS_MAX:
        raise TraceError(f"the rate is too low for {trace.name!r}: it would last over 146 years; give a higher one")
    new_ns, start_ns = round(new_span_ns), trace.requests[0].arrival_ns
    new_start_ns = round(start_ns * (new_span_ns / span_ns))
    return _with_arrivals(
        trace, [new_start_ns + (request.arrival_ns - start_ns) * new_ns // span_ns for request in trace.requests]
    )


def _with_arrivals(trace: Trace, arrival_ns: Sequence[int]) -> Trace:
    requests = trace.requests
    return replace(
        trace,
        requests=requests_from_columns(
            arrival_ns,
            [request.num_prompt_tokens for request in requests],
            [request.num_output_tokens for request in requests],
            content_ids=[request.content_ids for request in requests],
            priority=[request.priority for request in requests],
            previous=[request.previous for request in requests],
            gap_ns=[request.gap_ns for request in requests],
        ),
    )
