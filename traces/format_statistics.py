"""A trace's statistics as lines of plain text."""

from traces.statistics import LengthStatistics, TraceStatistics

_LABEL_WIDTH = 22


def format_statistics(statistics: TraceStatistics) -> tuple[str, ...]:
    """Lines for a terminal, none longer than 100 characters unless the trace's name is."""
    sessions = statistics.sessions
    windows = " / ".join(str(window_s) for window_s, _ in statistics.dispersion)
    dispersion = " / ".join(_number(value) for _, value in statistics.dispersion)
    lines = [
        _line("trace", statistics.name),
        _line("requests", f"{statistics.num_requests:,} in {statistics.span_s:,.1f} s"),
        _line("rate", f"{_number(statistics.rate_rps)} requests/s"),
        _line("inter-arrival CV", f"{_number(statistics.interarrival_cv)} (1: Poisson)"),
        _line("arrival IDC", f"{dispersion} in windows of {windows} s (1: Poisson)"),
        _line("prompt tokens", _lengths(statistics.prompt_tokens)),
        _line("output tokens", _lengths(statistics.output_tokens)),
        _line("Spearman", f"{_number(statistics.spearman)} between prompt and output tokens"),
    ]
    if sessions.num_follow_ups:
        lines.append(
            _line(
                "sessions",
                f"{sessions.num_sessions:,} of two turns or more, {sessions.num_follow_ups:,} follow-ups, "
                f"turns mean {sessions.num_turns_mean:.2f} max {sessions.num_turns_max}",
            )
        )
    else:
        lines.append(_line("sessions", "none recorded"))
    return (*lines, *_prefix_lines(statistics))


def _prefix_lines(statistics: TraceStatistics) -> list[str]:
    prefix = statistics.prefix
    if prefix is None:
        return [_line("prefix reuse", "not known: the trace has no content")]
    capacities = " / ".join(_thousands(capacity) for capacity, _ in prefix.lru_hit_ratios)
    ratios = " / ".join(f"{ratio:.3f}" for _, ratio in prefix.lru_hit_ratios)
    return [
        _line(
            "prefix reuse",
            f"{prefix.num_blocks:,} blocks of {prefix.block_size} tokens, {prefix.num_distinct_blocks:,} distinct",
        ),
        _line("  hits, no eviction", f"{prefix.infinite_hit_ratio:.3f} of blocks"),
        _line("  hits, LRU", f"{ratios} at {capacities} blocks"),
    ]


def _lengths(lengths: LengthStatistics) -> str:
    names = "/".join(f"{probability * 100:g}" for probability, _ in lengths.quantiles)
    values = " / ".join(f"{value:,.0f}" for _, value in lengths.quantiles)
    return f"mean {lengths.mean:,.1f}, max {lengths.maximum:,}, p{names}: {values}"


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL_WIDTH}}{text}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _thousands(count: int) -> str:
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
