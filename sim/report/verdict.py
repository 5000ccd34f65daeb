"""One sentence that says which cluster is better, by how much, and why; or how far simulations are from a server."""

from collections.abc import Sequence

from sagellm.core.request import LatencySLO
from sim.report.comparison import comparison_sentence, reference_run
from sim.report.statistics import Distribution
from sim.report.summarised_run import SummarisedRun
from sim.report.table import describe_slo

NOISE = 0.01
"""Clusters whose attainment (without an SLO: mean latency) differs by less than this share are called equal."""


def verdict(runs: Sequence[SummarisedRun]) -> str:
    """The sentence; ``runs`` is not empty."""
    finished = [run for run in runs if run.summary.completed]
    if not finished:
        return "No request completed on any of the clusters." if len(runs) > 1 else "No request completed."
    reference = reference_run(runs)
    if reference is not None:
        return " ".join(comparison_sentence(run, reference) for run in runs if run.served is None)
    if len(runs) == 1:
        return _describe(runs[0])
    if len(finished) == 1:
        return f"{finished[0].cluster} is the only cluster on which requests completed."
    if runs[0].slo == LatencySLO():
        return _compare_latency(finished)
    return _compare_goodput(runs)


def _describe(run: SummarisedRun) -> str:
    tail = f"p99 TTFT is {_ms(run.summary.ttft)} and p99 TPOT {_ms(run.summary.tpot)}"
    if run.slo == LatencySLO():
        return f"On {run.cluster} {tail}."
    return f"{run.cluster} keeps the SLO ({describe_slo(run.slo)}) for {_attainment(run):.1%} of requests; {tail}."


def _compare_goodput(runs: Sequence[SummarisedRun]) -> str:
    """By attainment: it is of the same requests everywhere, while a rate also hangs on when the last one ended."""
    best, second = sorted(runs, key=_attainment, reverse=True)[:2]
    if _attainment(best) == 0:
        return f"No request keeps the SLO ({describe_slo(best.slo)}) on any of the clusters."
    shares = f"{_attainment(best):.1%} against {_attainment(second):.1%} of requests"
    rates = f"{_goodput(best):.2f} against {_goodput(second):.2f} requests/s"
    if _attainment(best) - _attainment(second) <= NOISE * _attainment(best):
        return (
            f"No difference in goodput between {best.cluster} and {second.cluster}: {shares} keep the SLO ({rates}); "
            f"p99 TTFT is {_ms(best.summary.ttft)} against {_ms(second.summary.ttft)}, "
            f"p99 TPOT {_ms(best.summary.tpot)} against {_ms(second.summary.tpot)}."
        )
    return f"{best.cluster} is better than {second.cluster}: {shares} keep the SLO ({rates}), {_reason(best, second)}."


def _reason(best: SummarisedRun, second: SummarisedRun) -> str:
    """The limit that tells the two apart, and what the better one pays for it, if anything."""
    ttft_gain = (best.summary.ttft_attainment or 0.0) - (second.summary.ttft_attainment or 0.0)
    tpot_gain = (best.summary.tpot_attainment or 0.0) - (second.summary.tpot_attainment or 0.0)
    decisive, other = (_ttft, _tpot) if ttft_gain >= tpot_gain else (_tpot, _ttft)
    reason = f"because more keep the {decisive(best, second)}"
    if min(ttft_gain, tpot_gain) < -NOISE:
        reason += f", although fewer keep the {other(best, second)}"
    return reason


def _ttft(one: SummarisedRun, other: SummarisedRun) -> str:
    shares = f"{one.summary.ttft_attainment or 0.0:.1%} against {other.summary.ttft_attainment or 0.0:.1%}"
    return f"TTFT limit ({shares}; p99 {_ms(one.summary.ttft)} against {_ms(other.summary.ttft)})"


def _tpot(one: SummarisedRun, other: SummarisedRun) -> str:
    shares = f"{one.summary.tpot_attainment or 0.0:.1%} against {other.summary.tpot_attainment or 0.0:.1%}"
    return f"TPOT limit ({shares}; p99 {_ms(one.summary.tpot)} against {_ms(other.summary.tpot)})"


def _compare_latency(runs: Sequence[SummarisedRun]) -> str:
    best, second = sorted(runs, key=_mean_e2el_ms)[:2]
    ratio = 1 - _mean_e2el_ms(best) / _mean_e2el_ms(second) if _mean_e2el_ms(second) else 0.0
    if ratio <= NOISE:
        return f"No difference between {best.cluster} and {second.cluster}: mean latency is equal within {NOISE:.0%}."
    return (
        f"{best.cluster} is better than {second.cluster}: its mean latency is {ratio:.0%} lower (p99 TTFT "
        f"{_ms(best.summary.ttft)} against {_ms(second.summary.ttft)}, p99 TPOT {_ms(best.summary.tpot)} against "
        f"{_ms(second.summary.tpot)}); give --slo to compare goodput."
    )


def _goodput(run: SummarisedRun) -> float:
    return run.summary.request_goodput or 0.0


def _attainment(run: SummarisedRun) -> float:
    return run.summary.slo_attainment or 0.0


def _mean_e2el_ms(run: SummarisedRun) -> float:
    assert run.summary.e2el is not None, "the run completed requests"
    return run.summary.e2el.mean_ms


def _ms(distribution: Distribution | None) -> str:
    return "undefined" if distribution is None else f"{distribution.p99_ms:,.1f} ms"
