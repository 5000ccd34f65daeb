"""The JSON file: schema 1, one object per run."""

import json
from collections.abc import Sequence
from typing import IO, Any

from sim.report.comparison import differences, reference_run
from sim.report.statistics import Distribution
from sim.report.summarised_run import ServedRun, SummarisedRun

SCHEMA = 1


def write_json_report(file: IO[str], runs: Sequence[SummarisedRun]) -> None:
    """Write ``{"schema": 1, "runs": [...]}``. Latencies are in ms; what is not defined for a run is null.

    A run on a server has one key more, ``served``. Where there are simulated runs beside it, ``differences``
    says how far each is from what the server did.
    """
    report: dict[str, Any] = {"schema": SCHEMA, "runs": [_run_object(run) for run in runs]}
    reference = reference_run(runs)
    if reference is not None:
        report["differences"] = [_differences(run, reference) for run in runs if run.served is None]
    json.dump(report, file, indent=2, allow_nan=False)
    file.write("\n")


def _run_object(run: SummarisedRun) -> dict[str, Any]:
    summary = run.summary
    return {
        "cluster": run.cluster,
        "trace": run.trace,
        "seed": run.seed,
        "num_requests": summary.num_requests,
        "completed": summary.completed,
        "rejected": summary.rejected,
        "failed": summary.failed,
        "duration_s": summary.duration_s,
        "request_throughput": summary.request_throughput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "request_goodput": summary.request_goodput,
        "slo_attainment": summary.slo_attainment,
        "profile_status": run.profile_status,
        "log_sha256": run.log_sha256,
        "wall_s": run.wall_s,
        "num_steps": summary.num_steps,
        "num_preemptions": summary.num_preemptions,
        "prefix_hit_ratio": summary.prefix_hit_ratio,
        **_latencies("ttft", summary.ttft),
        **_latencies("tpot", summary.tpot),
        **_latencies("itl", summary.itl),
        **_latencies("e2el", summary.e2el),
        **({} if run.served is None else {"served": _served(run.served)}),
    }


def _served(served: ServedRun) -> dict[str, Any]:
    return {
        "model": served.model,
        **_latencies("lateness", served.lateness),
        **_latencies("client_lag", served.lag),
        "failures": dict(served.failures),
    }


def _differences(run: SummarisedRun, reference: SummarisedRun) -> dict[str, Any]:
    """``value / reference - 1`` by figure, under the names that figures have in ``runs``."""
    return {
        "cluster": run.cluster,
        "reference": reference.cluster,
        "relative": {difference.figure: difference.relative for difference in differences(run, reference)},
    }


def _latencies(name: str, distribution: Distribution | None) -> dict[str, float | None]:
    return {
        f"{statistic}_{name}_ms": None if distribution is None else getattr(distribution, f"{statistic}_ms")
        for statistic in ("mean", "median", "p90", "p99")
    }
