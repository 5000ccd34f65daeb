"""The summary against the glossary's definitions, computed here one by one."""

from array import array

import pytest
from handmade_runs import MS, metrics_of, record, rejected
from hypothesis import given
from hypothesis import strategies as st

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, LatencySLO
from sagellm.core.run_metrics import InstanceTimeline, RunMetrics, TransferRecord
from sim.report.summary import summarise

records = st.builds(
    record,
    st.uuids().map(str),
    arrival_ms=st.integers(0, 10_000),
    ttft_ms=st.integers(1, 1_000),
    tpot_ms=st.integers(1, 100),
    num_output_tokens=st.integers(1, 50),
    reason=st.sampled_from(list(FinishReason)),
)


@given(st.lists(records, min_size=1, max_size=20), st.integers(0, 3))
def test_rates_and_shares(some: list, num_rejected: int) -> None:
    everything = [*some, *(rejected(f"rejected-{i}") for i in range(num_rejected))]
    summary = summarise(metrics_of(*everything), {})
    completed = [r for r in some if r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)]
    good = [r for r in completed if r.meets_slo()]
    assert (summary.completed, summary.rejected) == (len(completed), num_rejected)
    assert summary.completed + summary.rejected + summary.failed == summary.num_requests == len(everything)
    assert summary.slo_attainment == pytest.approx(len(good) / len(everything))

    arrivals = [r.request.arrival_ns for r in everything]
    duration_s = (max(r.last_token_ns for r in some) - min(arrivals)) / 1e9
    assert summary.duration_s == pytest.approx(duration_s)
    assert summary.request_goodput == pytest.approx(len(good) / duration_s)
    assert summary.output_throughput == pytest.approx(sum(r.num_output_tokens for r in completed) / duration_s)
    prompts = 100 * len(completed) / duration_s
    assert summary.total_token_throughput == pytest.approx(summary.output_throughput + prompts)


def test_one_token_has_no_tpot_but_keeps_its_limit() -> None:
    summary = summarise(metrics_of(record("a", num_output_tokens=1)), {})
    assert summary.tpot is None
    assert summary.tpot_attainment == summary.slo_attainment == 1.0


def test_marginal_attainment_tells_which_limit_broke() -> None:
    summary = summarise(metrics_of(record("slow-start", ttft_ms=501), record("slow-tokens", tpot_ms=51)), {})
    assert (summary.slo_attainment, summary.ttft_attainment, summary.tpot_attainment) == (0.0, 0.5, 0.5)


def test_without_limits_every_completed_request_is_good() -> None:
    summary = summarise(metrics_of(record("a", ttft_ms=9_000, slo=LatencySLO())), {})
    assert summary.request_goodput == summary.request_throughput


def test_an_empty_run_has_no_numbers_rather_than_wrong_ones() -> None:
    summary = summarise(RunMetrics(), {})
    assert summary.num_requests == 0
    assert summary.duration_s is summary.request_throughput is summary.slo_attainment is summary.ttft is None
    assert summary.kv_use is summary.prefix_hit_ratio is summary.transfer is summary.itl is None


def test_transfers_that_failed_or_did_not_end_have_no_time() -> None:
    source, target = InstanceId("prefill-0"), InstanceId("decode-0")
    metrics = RunMetrics(
        transfers=[
            TransferRecord(RequestId("a"), source, target, 10, start_ns=0, end_ns=2 * MS),
            TransferRecord(RequestId("a"), source, target, 10, start_ns=0, end_ns=900 * MS, failed=True),
            TransferRecord(RequestId("a"), source, target, 10, start_ns=0),
        ]
    )
    transfer = summarise(metrics, {}).transfer
    assert transfer is not None
    assert transfer.p99_ms == pytest.approx(2.0)


def timeline(*steps: tuple[int, int, int]) -> InstanceTimeline:
    """Steps as (launched, ended, blocks in use)."""
    launched, ended, num_blocks = (array("q", column) for column in zip(*steps, strict=True))
    return InstanceTimeline(time_ns=launched, end_ns=ended, num_blocks_in_use=num_blocks)


def test_kv_use_is_weighted_by_time_and_by_size() -> None:
    small, large = InstanceId("small"), InstanceId("large")
    # The second step of `small` is launched while the first runs; then `small` is idle until 30.
    timelines = {small: timeline((0, 10, 100), (5, 15, 50), (30, 40, 0)), large: timeline((0, 40, 30))}
    kv_use = summarise(RunMetrics(timelines=timelines), {small: 100, large: 300}).kv_use
    assert kv_use is not None
    assert kv_use.mean == pytest.approx((100 * 10 + 50 * 5 + 30 * 40) / 40 / 400)
    assert kv_use.peak == 1.0


def test_a_step_that_never_ended_uses_nothing() -> None:
    lost = InstanceId("lost")
    metrics = RunMetrics(timelines={lost: timeline((0, 10, 50))})
    metrics.timelines[lost].time_ns.append(10)
    metrics.timelines[lost].num_blocks_in_use.append(80)
    kv_use = summarise(metrics, {lost: 100}).kv_use
    assert kv_use is not None
    assert (kv_use.mean, kv_use.peak) == (0.5, 0.8)
