"""One run in numbers. The definitions are those of the project's glossary, stated beside each field."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sagellm.core.identity import InstanceId
from sagellm.core.request import FinishReason
from sagellm.core.run_metrics import InstanceTimeline, RequestRecord, RunMetrics
from sim.report.statistics import (
    Distribution,
    FloatArray,
    IntArray,
    distribution_of,
    weighted_distribution_of,
)

COMPLETED = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class KVUse:
    """KV blocks that running requests hold, as a share of all blocks of the cluster.

    Sampled where an instance launches a step, and held while that step runs; an idle instance uses none.
    """

    mean: float  # over time
    peak: float  # of the fullest instance


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run came to. Ratios are shares of 1; a value that is not defined or not known for this run is None."""

    num_requests: int
    completed: int  # ended with stop or length
    rejected: int
    failed: int  # all others: errors, aborts, and what was unfinished when the run ended
    duration_s: float | None  # first arrival to last token
    request_throughput: float | None  # completed requests per second
    output_throughput: float | None  # output tokens of completed requests per second
    total_token_throughput: float | None  # the same with their prompt tokens
    request_goodput: float | None  # requests per second that keep all limits
    slo_attainment: float | None  # share of all requests that keep all limits; the rejected are in the denominator
    ttft_attainment: float | None  # share of all requests that keep the TTFT limit
    tpot_attainment: float | None  # the same for TPOT; a single token keeps any limit
    num_steps: int | None  # forward passes; None: not known, as a client of a server sees none
    num_preemptions: int | None
    prefix_hit_ratio: float | None  # cached prompt tokens / prompt tokens of admitted requests
    ttft: Distribution | None  # first token minus arrival, of completed requests
    tpot: Distribution | None  # (E2E - TTFT) / (output tokens - 1), of those with two tokens or more
    itl: Distribution | None  # gaps between consecutive tokens of one request (aiperf's ITL is our TPOT)
    e2el: Distribution | None  # last token minus arrival, of completed requests
    transfer: Distribution | None  # KV transfers that succeeded, start to end
    kv_use: KVUse | None


def summarise(metrics: RunMetrics, num_blocks: Mapping[InstanceId, int]) -> RunSummary:
    """Numbers for the table and the JSON file. ``num_blocks`` is each instance's KV size, for KV use."""
    records = list(metrics.requests.values())
    completed = [record for record in records if record.finish_reason in COMPLETED]
    num_rejected = sum(record.reject_reason is not None for record in records)
    duration_s = _duration_s(records)
    num_output_tokens = sum(record.num_output_tokens for record in completed)
    num_prompt_tokens = sum(record.request.num_prompt_tokens for record in completed)
    times = [_Times(record) for record in completed]
    num_good = sum(each.e2el_ns is not None and each.keeps_ttft and each.keeps_tpot for each in times)
    return RunSummary(
        num_requests=len(records),
        completed=len(completed),
        rejected=num_rejected,
        failed=len(records) - len(completed) - num_rejected,
        duration_s=duration_s,
        request_throughput=_rate(len(completed), duration_s),
        output_throughput=_rate(num_output_tokens, duration_s),
        total_token_throughput=_rate(num_prompt_tokens + num_output_tokens, duration_s),
        request_goodput=_rate(num_good, duration_s),
        slo_attainment=_ratio(num_good, len(records)),
        ttft_attainment=_ratio(sum(each.keeps_ttft for each in times), len(records)),
        tpot_attainment=_ratio(sum(each.keeps_tpot for each in times), len(records)),
        num_steps=metrics.num_steps,
        num_preemptions=metrics.num_preemptions,
        prefix_hit_ratio=_ratio(metrics.num_prompt_tokens_hit, metrics.num_prompt_tokens_queried),
        ttft=distribution_of(_defined(each.ttft_ns for each in times)),
        tpot=distribution_of(_defined(each.tpot_ns for each in times)),
        itl=weighted_distribution_of(
            np.asarray(metrics.itl_ns, dtype=np.int64), np.asarray(metrics.itl_count, dtype=np.int64)
        ),
        e2el=distribution_of(_defined(each.e2el_ns for each in times)),
        transfer=distribution_of(
            _defined(t.end_ns - t.start_ns for t in metrics.transfers if t.end_ns is not None and not t.failed)
        ),
        kv_use=_kv_use(metrics.timelines, num_blocks),
    )


def summarise_served(metrics: RunMetrics) -> RunSummary:
    """The same of what a client saw of a server. It knows nothing of steps, preemptions, KV and transfers."""
    return replace(summarise(metrics, {}), num_steps=None, num_preemptions=None)


class _Times:
    """A completed request's latencies, and whether each keeps its limit."""

    __slots__ = ("e2el_ns", "keeps_tpot", "keeps_ttft", "tpot_ns", "ttft_ns")

    def __init__(self, record: RequestRecord) -> None:
        slo = record.request.slo
        self.ttft_ns, self.tpot_ns, self.e2el_ns = record.ttft_ns, record.tpot_ns, record.e2el_ns
        self.keeps_ttft = self.ttft_ns is not None and (slo.ttft_ns is None or self.ttft_ns <= slo.ttft_ns)
        self.keeps_tpot = slo.tpot_ns is None or self.tpot_ns is None or self.tpot_ns <= slo.tpot_ns


def _duration_s(records: Sequence[RequestRecord]) -> float | None:
    """From the first arrival to the last token; None where no token came out."""
    last_token_ns = max((r.last_token_ns for r in records if r.last_token_ns is not None), default=None)
    if last_token_ns is None:
        return None
    return (last_token_ns - min(record.request.arrival_ns for record in records)) / 1e9


def _rate(amount: int, duration_s: float | None) -> float | None:
    return amount / duration_s if duration_s else None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _defined(values: Iterable[float | None]) -> FloatArray:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _kv_use(timelines: Mapping[InstanceId, InstanceTimeline], num_blocks: Mapping[InstanceId, int]) -> KVUse | None:
    """None where no instance with a known size ran a step."""
    used = {name: timeline for name, timeline in timelines.items() if num_blocks.get(name) and timeline.time_ns}
    if not used:
        return None
    in_use = {name: np.asarray(timeline.num_blocks_in_use, dtype=np.int64) for name, timeline in used.items()}
    num_block_ns = sum(float((in_use[name] * _step_lengths_ns(timeline)).sum()) for name, timeline in used.items())
    start_ns = min(timeline.time_ns[0] for timeline in used.values())
    end_ns = max(max(timeline.end_ns, default=start_ns) for timeline in used.values())
    peak = max(int(blocks.max()) / num_blocks[name] for name, blocks in in_use.items())
    mean = num_block_ns / (end_ns - start_ns) / sum(num_blocks.values()) if end_ns > start_ns else 0.0
    return KVUse(mean=mean, peak=peak)


def _step_lengths_ns(timeline: InstanceTimeline) -> FloatArray:
    """How long each step ran. One launched behind another begins when that ends; one that never ended, never."""
    times_ns = np.asarray(timeline.time_ns, dtype=np.int64)
    ends_ns = times_ns.copy()
    ends_ns[: len(timeline.end_ns)] = timeline.end_ns
    previous_ends_ns = np.concatenate((times_ns[:1], np.maximum.accumulate(ends_ns)[:-1]))
    lengths_ns: IntArray = np.maximum(ends_ns - np.maximum(times_ns, previous_ends_ns), 0)
    return lengths_ns.astype(np.float64)
