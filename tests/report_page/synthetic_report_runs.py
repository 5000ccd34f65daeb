"""Runs with realistic shapes for the page and the trace file, from a small queueing model."""

import heapq
import random
from array import array

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, LatencySLO, RequestSpec
from sagellm.core.run_metrics import InstanceTimeline, RequestRecord, RunMetrics, TransferRecord
from sim.report.report_run import ReportInstance, ReportRun

NS_PER_MS = 1_000_000
SLO = LatencySLO(ttft_ns=500 * NS_PER_MS, tpot_ns=50 * NS_PER_MS)
NUM_BLOCKS = 10_000
SEQS_MAX = 96


def synthetic_specs(num_requests: int, rate_per_s: float, seed: int, slo: LatencySLO = SLO) -> list[RequestSpec]:
    source = random.Random(seed)
    specs, now_s = [], 0.0
    for i in range(num_requests):
        # A load that swells and ebbs shows in the timelines.
        now_s += source.expovariate(rate_per_s * (1.25 if (i * 4 // max(1, num_requests)) % 2 else 0.75))
        num_prompt_tokens = min(8000, max(1, int(source.lognormvariate(6.6, 0.9))))
        num_output_tokens = min(1000, max(1, int(source.lognormvariate(5.0, 0.8))))
        name = RequestId(f"request-{i}")
        specs.append(RequestSpec(name, int(now_s * 1e9), num_prompt_tokens, num_output_tokens, slo=slo))
    return specs


class _InstanceModel:
    """Serves (ready time, record, prompt tokens to compute), first come first served."""

    def __init__(self, metrics: RunMetrics, name: InstanceId, decodes: bool) -> None:
        self.metrics, self.name, self.decodes = metrics, name, decodes
        self.timeline = metrics.timelines.setdefault(name, InstanceTimeline())
        self.handed_over: list[tuple[int, RequestRecord]] = []

    def serve(self, arrivals: list[tuple[int, RequestRecord, int]]) -> None:
        now_ns, index, count, order, blocks = 0, 0, 0, 0, 0
        running: list[tuple[int, int, RequestRecord]] = []
        while index < len(arrivals) or running:
            if not running and arrivals[index][0] > now_ns:
                now_ns = arrivals[index][0]
            admitted, num_tokens, first = [], 0, index
            while index < len(arrivals) and arrivals[index][0] <= now_ns and len(running) + len(admitted) < SEQS_MAX:
                if admitted and num_tokens + arrivals[index][2] > 8192:
                    break
                admitted.append(arrivals[index])
                num_tokens += arrivals[index][2]
                index += 1
            blocks += sum(self._blocks(record) for _, record, _ in admitted)
            num_waiting = self._num_waiting(arrivals, index, now_ns)
            step_ns = 6 * NS_PER_MS + num_tokens * 22_000 + len(running) * 90_000
            repeats = 1
            if running and not num_tokens and not num_waiting:
                repeats = running[0][0] - count
                if index < len(arrivals):
                    repeats = max(1, min(repeats, -((now_ns - arrivals[index][0]) // step_ns)))
            self._record(now_ns, len(running) + len(admitted), num_waiting, blocks, num_tokens, len(running))
            for _, record, _ in admitted:
                if record.first_scheduled_ns is None:
                    record.first_scheduled_ns = now_ns
            if running:
                self.metrics.itl_ns.append(step_ns)
                self.metrics.itl_count.append(len(running) * repeats)
            now_ns += step_ns * repeats
            self.timeline.end_ns.append(now_ns)
            self.timeline.num_repeats.append(repeats)
            count += repeats
            self.metrics.num_steps += repeats
            for _, record, _ in admitted:
                blocks -= self._start(record, now_ns, count, order, running)
                order += 1
            while running and running[0][0] <= count:
                blocks -= self._finish(heapq.heappop(running)[2], now_ns)
            assert first <= index

    @staticmethod
    def _num_waiting(arrivals: list[tuple[int, RequestRecord, int]], index: int, now_ns: int) -> int:
        ahead = index
        while ahead < len(arrivals) and arrivals[ahead][0] <= now_ns and ahead - index < 200:
            ahead += 1
        return ahead - index

    @staticmethod
    def _blocks(record: RequestRecord) -> int:
        return (record.request.num_prompt_tokens + record.request.max_output_tokens // 2) // 16 + 1

    def _start(
        self, record: RequestRecord, now_ns: int, count: int, order: int, running: list[tuple[int, int, RequestRecord]]
    ) -> int:
        """Blocks that are free again, as the request does not stay."""
        if record.first_token_ns is None:
            record.first_token_ns = record.last_token_ns = now_ns
            record.num_output_tokens = 1
            record.prefill_instance = self.name
        if not self.decodes:
            self.handed_over.append((now_ns, record))
            return self._blocks(record)
        if record.request.max_output_tokens == 1:
            return self._finish(record, now_ns)
        heapq.heappush(running, (count + record.request.max_output_tokens - 1, order, record))
        return 0

    def _finish(self, record: RequestRecord, now_ns: int) -> int:
        record.last_token_ns, record.finish_reason = now_ns, FinishReason.LENGTH
        record.decode_instance = self.name
        record.num_output_tokens = record.request.max_output_tokens
        return self._blocks(record)

    def _record(self, time_ns: int, *values: int) -> None:
        line = self.timeline
        columns = (
            line.time_ns,
            line.num_running,
            line.num_waiting,
            line.num_blocks_in_use,
            line.num_prefill_tokens,
            line.num_decode_seqs,
        )
        for column, value in zip(columns, (time_ns, *values), strict=True):
            column.append(value)


def _spread(work: list[tuple[int, RequestRecord, int]], count: int) -> list[list[tuple[int, RequestRecord, int]]]:
    return [work[i::count] for i in range(count)]


def synthetic_metrics(specs: list[RequestSpec], num_prefill: int, num_decode: int, seed: int) -> RunMetrics:
    """Colocated on ``num_decode`` instances where ``num_prefill`` is 0, else disaggregated."""
    source = random.Random(seed)
    metrics = RunMetrics(requests={spec.request_id: RequestRecord(spec) for spec in specs})
    work = []
    for i, record in enumerate(metrics.requests.values()):
        if i % 200 == 199:
            record.reject_reason = "the queue is full"
        else:
            work.append((record.request.arrival_ns, record, record.request.num_prompt_tokens))
    if num_prefill:
        work = _prefilled(metrics, work, num_prefill, num_decode, source)
    for i, part in enumerate(_spread(sorted(work, key=lambda item: item[0]), num_decode)):
        _InstanceModel(metrics, InstanceId(f"{'decode' if num_prefill else 'mixed'}-{i}"), True).serve(part)
    _queue(metrics, source)
    return metrics


def _prefilled(
    metrics: RunMetrics,
    work: list[tuple[int, RequestRecord, int]],
    num_prefill: int,
    num_decode: int,
    source: random.Random,
) -> list[tuple[int, RequestRecord, int]]:
    moved = []
    for i, part in enumerate(_spread(work, num_prefill)):
        model = _InstanceModel(metrics, InstanceId(f"prefill-{i}"), False)
        model.serve(part)
        for now_ns, record in model.handed_over:
            num_bytes = record.request.num_prompt_tokens * 57_344
            end_ns = now_ns + 300_000 + int(num_bytes / 40 * source.uniform(1, 2.5))
            target = InstanceId(f"decode-{source.randrange(num_decode)}")
            metrics.transfers.append(
                TransferRecord(record.request.request_id, model.name, target, num_bytes, now_ns, end_ns)
            )
            moved.append((end_ns, record, 0))
    return moved


def _queue(metrics: RunMetrics, source: random.Random) -> None:
    times_ns = sorted(record.request.arrival_ns for record in metrics.requests.values())
    depth = 0
    for time_ns in times_ns:
        depth = max(0, depth + source.choice((-1, 0, 0, 1)))
        metrics.queue_time_ns.append(time_ns)
        metrics.queue_depth.append(depth)
    metrics.queue_time_ns, metrics.queue_depth = array("q", metrics.queue_time_ns), array("q", metrics.queue_depth)


def synthetic_run(
    num_requests: int = 300,
    num_prefill: int = 0,
    num_decode: int = 4,
    seed: int = 1,
    rate_per_s: float = 20.0,
    cluster: str = "h200x4-colocated",
    trace: str = "azure-conv",
    slo: LatencySLO = SLO,
) -> ReportRun:
    metrics = synthetic_metrics(synthetic_specs(num_requests, rate_per_s, seed, slo), num_prefill, num_decode, seed)
    instances = tuple(ReportInstance(name, name.split("-")[0], NUM_BLOCKS) for name in metrics.timelines)
    rows = (
        ("completed", f"{sum(r.e2el_ns is not None for r in metrics.requests.values()):,}"),
        ("forward passes", f"{metrics.num_steps:,}"),
    )
    return ReportRun(cluster, trace, seed, "measured", metrics, rows, instances)
