"""How far the simulator is from measured online runs of vLLM.

    python benchmarks/fidelity.py [--run FILE.csv]... [--cluster FILE|NAME]... [--jitter N] [--json FILE]

Each run is a CSV file with a row per request as its client saw it (``sent_s, num_prompt_tokens,
num_output_tokens, ttft_ms, e2e_ms``). The simulator gets the first three columns. By default the runs
are those of ``../shared/data/h200``, and the clusters ``h200x1-vllm`` and the same with the profile
family in place of the profile that was fitted to that very model.

``--jitter N`` also gives the range of each error over N replays in which every request is sent up to a
millisecond later: what a figure owes to chance.

Definitions: TTFT is first token minus request start; TPOT is (E2E - TTFT) / (output tokens - 1), of
requests with two tokens or more; throughput is output tokens over the time from the first request to
the last token. Percentiles are interpolated linearly.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sagellm.cluster.build import build_cluster
from sagellm.cluster.description import ClusterDescription
from sagellm.cluster.named_files import named_cluster_text
from sagellm.cluster.reading import parse_cluster, read_cluster
from sim.calibration.measured_steps import MeasuredRequest, read_requests
from sim.cluster_file import sim_cluster
from sim.replay import replay
from sim.report.statistics import Distribution, distribution_of
from sim.report.summary import summarise
from traces.reader import read_trace
from traces.request_trace import Trace

DATA_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "h200"
RUN_FILES = ("vllm-0.22.1_qwen2.5-7b_online_conv_16.csv", "vllm-0.22.1_qwen2.5-7b_online_code_6.csv")
FITTED_CLUSTER = "h200x1-vllm"
FITTED_PROFILE = "h200/vllm-0.22.1-qwen2.5-7b"
FAMILY_PROFILE = "h200/vllm-0.22.1"
STATISTICS = ("mean", "median", "p90", "p99")
THROUGHPUT = "output tokens/s"
JITTER_NS = 1_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest relative errors that pass; None: not limited."""

    ttft: float
    tpot_and_e2el: float
    p99: float | None
    throughput: float | None

    def of(self, metric: str, statistic: str) -> float | None:
        """The limit of one figure."""
        if metric == THROUGHPUT:
            return self.throughput
        if statistic == "p99":
            return self.p99
        return self.ttft if metric == "TTFT" else self.tpot_and_e2el


FITTED_LIMITS = Limits(ttft=0.03, tpot_and_e2el=0.03, p99=0.06, throughput=0.01)
FAMILY_LIMITS = Limits(ttft=0.15, tpot_and_e2el=0.10, p99=None, throughput=None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of one run: measured, simulated, and the relative error that is allowed."""

    metric: str
    statistic: str
    measured: float
    simulated: float
    limit: float | None

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1

    @property
    def passes(self) -> bool:
        return self.limit is None or abs(self.error) <= self.limit


def compare(run: Path, cluster: ClusterDescription, limits: Limits, jitter_seed: int | None = None) -> list[Comparison]:
    """Replay the run's requests on the cluster. Raises ValueError where the file cannot be read."""
    measured = measured_figures(read_requests(run))
    trace = read_trace(run, seed=0)
    simulated = simulated_figures(trace if jitter_seed is None else jittered(trace, jitter_seed), cluster)
    return [
        Comparison(metric, statistic, value, simulated[metric, statistic], limits.of(metric, statistic))
        for (metric, statistic), value in measured.items()
    ]


def jittered(trace: Trace, seed: int) -> Trace:
    """Each request up to a millisecond later."""
    rng = random.Random(seed)
    later = (replace(request, arrival_ns=request.arrival_ns + rng.randrange(JITTER_NS)) for request in trace.requests)
    return replace(trace, requests=tuple(sorted(later, key=lambda request: request.arrival_ns)))


Figures = Mapping[tuple[str, str], float]
"""Milliseconds, or tokens per second, by metric and statistic."""


def measured_figures(requests: Sequence[MeasuredRequest]) -> Figures:
    """What the clients saw, by the definitions above."""
    sent_us, first_us, last_us, num_output_tokens = np.array(
        [(r.sent_us, r.first_token_us, r.last_token_us, r.num_output_tokens) for r in requests]
    ).T
    many = num_output_tokens > 1
    tpot_us = (last_us - first_us)[many] / (num_output_tokens[many] - 1)
    duration_s = (last_us.max() - sent_us.min()) / 1e6
    return _figures(
        distribution_of((first_us - sent_us) * 1e3),
        distribution_of(tpot_us * 1e3),
        distribution_of((last_us - sent_us) * 1e3),
        float(num_output_tokens.sum() / duration_s),
    )


def simulated_figures(trace: Trace, cluster: ClusterDescription) -> Figures:
    """The same of a replay."""
    summary = summarise(replay(sim_cluster(build_cluster(cluster)), trace).metrics, {})
    assert summary.completed == summary.num_requests, f"{summary.num_requests - summary.completed} did not complete"
    assert summary.output_throughput is not None
    return _figures(summary.ttft, summary.tpot, summary.e2el, summary.output_throughput)


def _figures(ttft: Distribution | None, tpot: Distribution | None, e2el: Distribution | None, rate: float) -> Figures:
    figures: dict[tuple[str, str], float] = {}
    for metric, distribution in (("TTFT", ttft), ("TPOT", tpot), ("E2E", e2el)):
        for statistic in STATISTICS if distribution is not None else ():
            figures[metric, statistic] = getattr(distribution, f"{statistic}_ms")
    figures[THROUGHPUT, ""] = rate
    return figures


def fitted_cluster() -> ClusterDescription:
    """The named cluster whose profile was fitted to the runs' engine, card and model."""
    return read_cluster(FITTED_CLUSTER)


def family_cluster() -> ClusterDescription:
    """The same cluster, priced operator by operator."""
    text = named_cluster_text(FITTED_CLUSTER).replace(f"profile: {FITTED_PROFILE}", f"profile: {FAMILY_PROFILE}")
    return parse_cluster(text, source="the family's cluster", name=f"{FITTED_CLUSTER}, profile {FAMILY_PROFILE}")


def table(comparisons: Sequence[Comparison], jitters: Sequence[Sequence[Comparison]]) -> str:
    """One line for each figure."""
    heading = f"{'':<16}{'':<8}{'measured':>10}{'simulated':>11}{'error':>9}{'limit':>7}"
    lines = [heading + ("   error with jitter" if jitters else "")]
    for index, c in enumerate(comparisons):
        limit = "-" if c.limit is None else f"{c.limit:.0%}"
        line = f"{c.metric:<16}{c.statistic:<8}{c.measured:>10,.2f}{c.simulated:>11,.2f}{c.error:>+9.2%}{limit:>7}"
        errors = [jitter[index].error for jitter in jitters]
        line += f"   {min(errors):+.2%} to {max(errors):+.2%}" if errors else ""
        lines.append(line if c.passes else f"{line}   outside")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", dest="runs", action="append", type=Path, metavar="FILE.csv")
    parser.add_argument("--cluster", dest="clusters", action="append", metavar="FILE|NAME")
    parser.add_argument("--jitter", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.clusters:
        clusters = [(read_cluster(name), FAMILY_LIMITS) for name in options.clusters]
    else:
        clusters = [(fitted_cluster(), FITTED_LIMITS), (family_cluster(), FAMILY_LIMITS)]
    results = []
    for run in options.runs or [DATA_FOLDER / name for name in RUN_FILES]:
        for cluster, limits in clusters:
            comparisons = compare(run, cluster, limits)
            jitters = [compare(run, cluster, limits, seed) for seed in range(options.jitter)]
            print(f"{run.name} on {cluster.name}\n{table(comparisons, jitters)}\n")
            figures = [{**asdict(c), "error": c.error, "passes": c.passes} for c in comparisons]
            results.append({"run": run.name, "cluster": cluster.name, "figures": figures})
    if options.json is not None:
        options.json.write_text(json.dumps({"schema": 1, "comparisons": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
