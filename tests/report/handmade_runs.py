"""Runs made by hand, for tests of what is reported about them."""

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, LatencySLO, RequestSpec
from sagellm.core.run_metrics import RequestRecord, RunMetrics
from sim.report.summarised_run import SummarisedRun
from sim.report.summary import summarise

MS = 1_000_000
SLO = LatencySLO(ttft_ns=500 * MS, tpot_ns=50 * MS)


def record(
    name: str,
    *,
    arrival_ms: int = 0,
    ttft_ms: int = 100,
    tpot_ms: int = 10,
    num_output_tokens: int = 11,
    slo: LatencySLO = SLO,
    reason: FinishReason = FinishReason.LENGTH,
) -> RequestRecord:
    """A request of 100 prompt tokens that ended as told."""
    first_token_ns = (arrival_ms + ttft_ms) * MS
    return RequestRecord(
        RequestSpec(RequestId(name), arrival_ms * MS, 100, num_output_tokens, slo=slo),
        num_output_tokens=num_output_tokens,
        first_token_ns=first_token_ns,
        last_token_ns=first_token_ns + (num_output_tokens - 1) * tpot_ms * MS,
        prefill_instance=InstanceId("mixed-0"),
        decode_instance=InstanceId("mixed-0"),
        finish_reason=reason,
    )


def rejected(name: str, slo: LatencySLO = SLO) -> RequestRecord:
    return RequestRecord(RequestSpec(RequestId(name), 0, 100, 10, slo=slo), reject_reason="the queue is full")


def metrics_of(*records: RequestRecord) -> RunMetrics:
    return RunMetrics(requests={each.request.request_id: each for each in records})


def run_of(cluster: str, *records: RequestRecord, slo: LatencySLO = SLO) -> SummarisedRun:
    metrics = metrics_of(*records)
    return SummarisedRun(
        cluster=cluster,
        trace="handmade",
        seed=7,
        slo=slo,
        profile_status="spec",
        log_sha256="0" * 64,
        wall_s=0.25,
        num_blocks={InstanceId("mixed-0"): 100},
        roles={InstanceId("mixed-0"): Role.MIXED},
        metrics=metrics,
        summary=summarise(metrics, {InstanceId("mixed-0"): 100}),
    )
