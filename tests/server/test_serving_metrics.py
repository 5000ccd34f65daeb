"""Figures of a running server: against sums over made-up lives of requests, and in Prometheus' own parser."""

import asyncio
from bisect import bisect_left

import pytest
from echo_engine import EchoEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from running_app import running_app

from sagellm.core.identity import CONTROL_PLANE, InstanceId, RequestId, StepId
from sagellm.core.messages import (
    AssignRequest,
    EmitTokens,
    RejectRequest,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
)
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.server.engine import InstanceStatus
from sagellm.server.page.live_series import SECOND_NS, SECONDS_KEPT, Gauges, LiveSeries
from sagellm.server.prometheus.bucket_counts import TTFT_S, BucketCounts, one_two_five
from sagellm.server.prometheus.serving_metrics import ServingMetrics

_INSTANCE = InstanceId("mixed-0")
_MS = 1_000_000


def _spec(name: str, arrival_ns: int, num_prompt_tokens: int = 5) -> RequestSpec:
    return RequestSpec(RequestId(name), arrival_ns, num_prompt_tokens, 100)


def _emit(now_ns: int, *names: str) -> EmitTokens:
    request_ids = tuple(map(RequestId, names))
    return EmitTokens(_INSTANCE, StepId(0), request_ids, (now_ns,), ((1,),) * len(names))


def test_intervals_of_one_request() -> None:
    """Arrives at 0, is assigned at 300, and gets tokens at 500, 600 and 900 ms."""
    metrics = ServingMetrics("toy", 1000)
    metrics.observe(1 * _MS, RequestArrived(_spec("a", 0)))
    metrics.observe(300 * _MS, AssignRequest(_INSTANCE, _spec("a", 0)))
    for at_ms in (500, 600, 900):
        metrics.observe(at_ms * _MS, _emit(at_ms * _MS, "a"))
    metrics.observe(901 * _MS, RequestFinished(RequestId("a"), _INSTANCE, FinishReason.LENGTH, 3))
    times = metrics.latencies
    found = {
        "ttft": times.ttft.total,
        "gaps": times.token_gap.total,
        "tpot": times.tpot.total,
        "e2e": times.end_to_end.total,
        "queue": times.queue.total,
        "prefill": times.prefill.total,
        "decode": times.decode.total,
        "inference": times.inference.total,
    }
    assert found == pytest.approx(
        {
            "ttft": 0.5,
            "gaps": 0.4,
            "tpot": 0.2,
            "e2e": 0.9,
            "queue": 0.3,
            "prefill": 0.2,
            "decode": 0.4,
            "inference": 0.6,
        }
    )
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (5, 3)
    assert metrics.num_finished[FinishReason.LENGTH] == 1
    assert metrics.num_requests_kept == 0


@settings(deadline=None)
@given(lives=st.lists(st.sampled_from(["finished", "rejected", "cancelled", "lost"]), max_size=30))
def test_nothing_is_kept_of_requests_that_are_over(lives: list[str]) -> None:
    metrics = ServingMetrics("toy", 1000)
    for number, life in enumerate(lives):
        spec, now_ns = _spec(f"{life}-{number}", number), number * _MS
        metrics.observe(now_ns, RequestArrived(spec))
        if life != "rejected":
            metrics.observe(now_ns, AssignRequest(_INSTANCE, spec))
            metrics.observe(now_ns, _emit(now_ns, spec.request_id))
        if life == "cancelled":
            metrics.observe(now_ns, RequestCancelled(spec.request_id))
            metrics.observe(now_ns, RequestFinished(spec.request_id, _INSTANCE, FinishReason.ABORT, 1))
        elif life == "finished":
            metrics.observe(now_ns, RequestFinished(spec.request_id, CONTROL_PLANE, FinishReason.STOP, 1))
        else:
            metrics.observe(now_ns, RejectRequest(spec.request_id, "full", retryable=life == "rejected"))
        metrics.observe(now_ns, _emit(now_ns, spec.request_id))  # what comes after the end counts nowhere
    assert metrics.num_requests_kept == 0
    assert metrics.num_finished[FinishReason.ABORT] == lives.count("cancelled")
    assert metrics.num_finished[FinishReason.STOP] == lives.count("finished")
    assert metrics.num_rejected == {True: lives.count("rejected"), False: lives.count("lost")}
    assert metrics.num_output_tokens == len(lives) - lives.count("rejected")


def test_steps_count_with_their_average_tokens() -> None:
    metrics = ServingMetrics("toy", 1000)
    for num_steps, num_prompt, num_output in ((0, 0, 0), (2, 300, 0), (12, 300, 40), (3, 0, 0)):
        status = InstanceStatus(_INSTANCE, 0, 0, 0, num_steps, num_prompt, num_output, 0, 0, 0, 0)
        metrics.observe_status(0, status)
    rows = dict(metrics.sizes.step.cumulative())
    assert (rows["1.0"], rows["8.0"], rows["128.0"], rows["256.0"]) == (0, 10, 10, 12)


@settings(deadline=None)
@given(values=st.lists(st.floats(0, 3000), max_size=50))
def test_buckets_count_values_at_or_below_their_bound(values: list[float]) -> None:
    counts = BucketCounts(TTFT_S)
    for value in values:
        counts.add(value)
    rows = counts.cumulative()
    assert [count for _, count in rows[:-1]] == [sum(value <= bound for value in values) for bound in TTFT_S]
    assert rows[-1] == ("+Inf", len(values))
    assert counts.total == pytest.approx(sum(values))
    assert all(bisect_left(TTFT_S, bound) == index for index, bound in enumerate(TTFT_S))


def test_one_two_five_ends_at_the_largest_value() -> None:
    assert one_two_five(4096) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
    assert one_two_five(1) == (1,)


# The names that dashboards, autoscalers and gateways made for vLLM ask for, with their kinds.
_EXPECTED = {
    "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"],
    "counter": [
        *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "generation_tokens"),
        *("prompt_tokens_by_source", "prompt_tokens_cached", "request_success", "corrupted_requests"),
    ],
    "histogram": [
        *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds"),
        *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_params_max_tokens", "request_max_num_generation_tokens"),
        *("request_params_n", "iteration_tokens_total", "request_prefill_kv_computed_tokens"),
    ],
}


def test_prometheus_reads_the_names_that_vllm_has() -> None:
    async def test() -> str:
        metrics = ServingMetrics("toy", 256)
        async with running_app(EchoEngine(), metrics=metrics) as client:
            await client.post("/v1/completions", {"prompt": "x", "n": 2})
            await client.post("/v1/completions", {"prompt": ""})
            await client.get("/nothing")
            return (await client.get("/metrics"))[1].decode()

    families = {family.name: family for family in text_string_to_metric_families(asyncio.run(test()))}
    for kind, names in _EXPECTED.items():
        for name in names:
            family = families[f"vllm:{name}"]
            assert family.type == kind
            for sample in family.samples:
                assert {"model_name", "engine"} <= set(sample.labels)
                assert (sample.labels["model_name"], sample.labels["engine"]) == ("toy", "0")
    values = {
        sample.name: sample.value
        for family in families.values()
        for sample in family.samples
        if len(sample.labels) == 2
    }
    assert values["vllm:kv_cache_usage_perc"] == pytest.approx(7 / 64)
    assert values["vllm:request_params_n_sum"] == 2
    assert values["vllm:prefix_cache_hits_total"] == 5
    reasons = {sample.labels["finished_reason"] for sample in families["vllm:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}
    bounds = [
        sample.labels["le"] for sample in families["vllm:time_to_first_token_seconds"].samples if "le" in sample.labels
    ]
    assert bounds == [str(bound) for bound in TTFT_S] + ["+Inf"]
    ours = [s.labels["le"] for s in families["sagellm:time_to_first_token_seconds"].samples if "le" in s.labels]
    assert set(ours) - set(bounds) == {"0.2", "2.0", "3.0"}
    requests = {tuple(sample.labels.values()): sample.value for sample in families["http_requests"].samples}
    assert requests == {
        ("/v1/completions", "POST", "2xx"): 1,
        ("/v1/completions", "POST", "4xx"): 1,
        ("none", "GET", "4xx"): 1,
    }
    assert families["http_request_duration_seconds"].type == "histogram"
    (info,) = families["sagellm:instance_info"].samples
    assert (info.labels["instance_id"], info.labels["role"], info.labels["device"]) == ("echo-0", "mixed", "echo")


@settings(deadline=None)
@given(events=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 5)), max_size=60))
def test_the_live_series_has_every_second_once(events: list[tuple[int, int]]) -> None:
    series, total_by_second = LiveSeries(), dict[int, int]()
    series.gauges = lambda: Gauges(num_running=3)
    for second, num_tokens in sorted(events):
        series.emitted(second * SECOND_NS + 5, num_tokens)
        total_by_second[second] = total_by_second.get(second, 0) + num_tokens
    found = series.since(1000 * SECOND_NS, -1)
    seconds = [each.second for each in found]
    if events:
        assert seconds == list(range(max(min(total_by_second), 1000 - SECONDS_KEPT), 1000))
    assert len(found) <= SECONDS_KEPT
    for each in found:
        assert each.output_tokens == total_by_second.get(each.second, 0)
        assert each.gauges.num_running == 3
    assert series.since(1000 * SECOND_NS, 990) == found[-9:] if events else found == []


def test_percentiles_of_a_second() -> None:
    series = LiveSeries()
    for number in range(1, 11):
        series.first_token(SECOND_NS, number / 10, 4)
    (second,) = series.since(2 * SECOND_NS, -1)
    assert (second.ttft_p50_s, second.ttft_p90_s, second.tpot_p50_s) == (0.6, 1.0, None)
    assert second.prompt_tokens == 40
