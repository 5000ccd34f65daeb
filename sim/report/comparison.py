"""How far simulated runs are from what a client saw of a server, figure by figure."""

from collections.abc import Sequence
from dataclasses import dataclass

from sim.report.summarised_run import SummarisedRun
from sim.report.summary import RunSummary

LATENCIES = (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E"))
STATISTICS = (("mean", "mean"), ("median", "p50"), ("p90", "p90"), ("p99", "p99"))
THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput")

JUDGED = tuple(
    f"{statistic}_{latency}_ms" for latency in ("ttft", "tpot", "e2el") for statistic in ("mean", "median", "p90")
)
"""The figures by which a prediction is judged; tails of one short run owe too much to chance."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure, under its name in the JSON file. ``relative`` is ``value / reference - 1``."""

    figure: str
    value: float
    reference: float
    relative: float


def reference_run(runs: Sequence[SummarisedRun]) -> SummarisedRun | None:
    """The run that simulations are held against: the first on a server; None where there are not both kinds."""
    served = [run for run in runs if run.served is not None]
    return served[0] if served and len(served) < len(runs) else None


def relative_difference(value: float | None, reference: float | None) -> float | None:
    """None where one of the two is not defined, or there is nothing to relate to."""
    return None if value is None or not reference else value / reference - 1


def differences(run: SummarisedRun, reference: SummarisedRun) -> list[Difference]:
    """All figures that are defined for both."""
    values, references = compared_figures(run.summary), compared_figures(reference.summary)
    return [
        Difference(figure, values[figure], references[figure], values[figure] / references[figure] - 1)
        for figure in values
        if references.get(figure)
    ]


def compared_figures(summary: RunSummary) -> dict[str, float]:
    """Mean, p50, p90 and p99 of the latencies, and the throughputs, as far as they are defined."""
    figures: dict[str, float] = {}
    for latency, _ in LATENCIES:
        distribution = getattr(summary, latency)
        for statistic, _ in STATISTICS if distribution is not None else ():
            figures[f"{statistic}_{latency}_ms"] = getattr(distribution, f"{statistic}_ms")
    for name in THROUGHPUTS:
        value = getattr(summary, name)
        if value is not None:
            figures[name] = value
    return figures


def comparison_sentence(run: SummarisedRun, reference: SummarisedRun) -> str:
    """How far a simulated run is off, and where most."""
    judged = [difference for difference in differences(run, reference) if difference.figure in JUDGED]
    if not judged:
        return f"{run.cluster} and {reference.cluster} have no figure in common: too few requests completed."
    worst = max(judged, key=lambda difference: abs(difference.relative))
    return (
        f"{run.cluster} is within {abs(worst.relative):.1%} of what {reference.cluster} did in mean, p50 and p90 of "
        f"TTFT, TPOT and E2E (furthest off: {figure_name(worst.figure)}, {worst.relative:+.1%})."
    )


def figure_name(figure: str) -> str:
    """``p50 TTFT`` for ``median_ttft_ms``."""
    statistic, _, latency = figure.removesuffix("_ms").partition("_")
    return f"{dict(STATISTICS)[statistic]} {dict(LATENCIES)[latency]}"
