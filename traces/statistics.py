"""What a trace is like, in numbers that can be held against published ones."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pvariance

from traces.prefix_statistics import PrefixStatistics, prefix_statistics
from traces.request_trace import Trace
from traces.shaping import mean_rate

DISPERSION_WINDOWS_S = (1, 3, 10, 30, 60, 300)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_NANOSECONDS_PER_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Tokens per request."""

    mean: float
    minimum: int
    maximum: int
    quantiles: tuple[tuple[float, float], ...]  # (probability, tokens)


@dataclass(frozen=True, slots=True)
class SessionStatistics:
    """Requests linked by ``previous``."""

    num_sessions: int  # of two turns or more
    num_follow_ups: int
    num_turns_mean: float  # over all sessions, single requests among them
    num_turns_max: int


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """All of a trace; None stands for what cannot be told from so few requests or so short a time."""

    name: str
    num_requests: int
    span_s: float  # from the first arrival to the last
    rate_rps: float | None
    interarrival_cv: float | None  # standard deviation over mean; 1 for a Poisson process
    dispersion: tuple[tuple[int, float | None], ...]  # (window in s, variance over mean of arrivals in it)
    prompt_tokens: LengthStatistics
    output_tokens: LengthStatistics
    spearman: float | None  # rank correlation of prompt and output tokens
    sessions: SessionStatistics
    prefix: PrefixStatistics | None  # None without content


def trace_statistics(trace: Trace) -> TraceStatistics:
    """Measure a trace of one request or more."""
    arrivals_ns = [request.arrival_ns for request in trace.requests]
    prompts = [request.num_prompt_tokens for request in trace.requests]
    outputs = [request.num_output_tokens for request in trace.requests]
    return TraceStatistics(
        name=trace.name,
        num_requests=len(trace.requests),
        span_s=(arrivals_ns[-1] - arrivals_ns[0]) / _NANOSECONDS_PER_SECOND,
        rate_rps=mean_rate(trace),
        interarrival_cv=interarrival_cv(arrivals_ns),
        dispersion=tuple((window_s, index_of_dispersion(arrivals_ns, window_s)) for window_s in DISPERSION_WINDOWS_S),
        prompt_tokens=length_statistics(prompts),
        output_tokens=length_statistics(outputs),
        spearman=spearman(prompts, outputs),
        sessions=session_statistics(trace),
        prefix=prefix_statistics(trace),
    )


def interarrival_cv(arrivals_ns: Sequence[int]) -> float | None:
    """Coefficient of variation of the times between sorted arrivals."""
    gaps = [later - earlier for earlier, later in pairwise(arrivals_ns)]
    mean = fmean(gaps) if gaps else 0.0
    return float(pvariance(map(float, gaps), mean) ** 0.5 / mean) if mean else None


def index_of_dispersion(arrivals_ns: Sequence[int], window_s: float) -> float | None:
    """Variance over mean of the number of sorted arrivals in windows of ``window_s``; 1 for a Poisson process.

    Windows are whole and begin with the first arrival; None where there are fewer than two.
    """
    width_ns = round(window_s * _NANOSECONDS_PER_SECOND)
    start_ns = arrivals_ns[0]
    num_windows = (arrivals_ns[-1] - start_ns) // width_ns
    if num_windows < 2:
        return None
    edges = [bisect_left(arrivals_ns, start_ns + index * width_ns) for index in range(num_windows + 1)]
    counts = [float(after - before) for before, after in pairwise(edges)]
    mean = fmean(counts)
    return float(pvariance(counts, mean) / mean) if mean else None


def length_statistics(lengths: Sequence[int]) -> LengthStatistics:
    """Mean, range and quantiles (linear between order statistics) of one length or more."""
    ordered = sorted(lengths)
    return LengthStatistics(
        mean=fmean(ordered),
        minimum=ordered[0],
        maximum=ordered[-1],
        quantiles=tuple((probability, _quantile(ordered, probability)) for probability in QUANTILES),
    )


def _quantile(ordered: Sequence[int], probability: float) -> float:
    position = probability * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def spearman(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where either sequence is constant."""
    ranks_first, ranks_second = _ranks(first), _ranks(second)
    mean = (len(first) - 1) / 2
    variance_first = sum((rank - mean) ** 2 for rank in ranks_first)
    variance_second = sum((rank - mean) ** 2 for rank in ranks_second)
    if not variance_first or not variance_second:
        return None
    covariance = sum((one - mean) * (other - mean) for one, other in zip(ranks_first, ranks_second, strict=True))
    return float(covariance / (variance_first * variance_second) ** 0.5)


def _ranks(values: Sequence[int]) -> list[float]:
    """Each value's place in order, from 0, equal values sharing the mean of their places."""
    ordered = sorted(values)
    rank_of: dict[int, float] = {}
    start = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or ordered[end] != ordered[start]:
            rank_of[ordered[start]] = (start + end - 1) / 2
            start = end
    return [rank_of[value] for value in values]


def session_statistics(trace: Trace) -> SessionStatistics:
    """Count sessions: trees of requests linked by ``previous``."""
    root_of: list[int] = []
    num_turns: dict[int, int] = {}
    for index, request in enumerate(trace.requests):
        root = index if request.previous is None else root_of[request.previous]
        root_of.append(root)
        num_turns[root] = num_turns.get(root, 0) + 1
    turns = list(num_turns.values())
    return SessionStatistics(
        num_sessions=sum(count > 1 for count in turns),
        num_follow_ups=len(trace.requests) - len(turns),
        num_turns_mean=fmean(turns),
        num_turns_max=max(turns),
    )
