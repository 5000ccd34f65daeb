"""Runs as a Chrome trace file, which the Perfetto UI opens.

Source: the "Trace Event Format" document of the Chromium project. A run is a process. An instance is
a thread whose slices are steps; its load is counters. A request is an async slice that holds its
phases, a KV transfer is an async slice on the network, and an arrow leads from the step that ended a
prefill to the first step that the decode instance launched when the KV was there.
"""

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.run_metrics import InstanceTimeline, RequestRecord, RunMetrics, TransferRecord
from sim.report.output_file import output_errors, replacing
from sim.report.report_run import ReportRun, run_instances, run_labels
from sim.report.step_spans import step_spans_ns

NETWORK_THREAD = 1
FIRST_INSTANCE_THREAD = 2
EVENTS_PER_WRITE = 4096
Spans = tuple[list[int], list[int]]


def write_perfetto(path: Path, runs: Sequence[ReportRun]) -> None:
    """Write the trace file of one or more runs, event by event.

    Times are microseconds from each run's first moment, exact to the nanosecond.

    Raises:
        OutputError: the file cannot be written; then nothing is left behind.
    """
    events = trace_events(runs)
    with replacing(path) as file, output_errors(path), file.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        separator = ""
        while batch := list(islice(events, EVENTS_PER_WRITE)):
            stream.write(separator + ",\n".join(batch))
            separator = ",\n"
        stream.write("\n]}\n")


def trace_events(runs: Sequence[ReportRun]) -> Iterator[str]:
    """Each event as JSON text; in order of time within each thread, counter and async slice."""
    for process_id, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True), start=1):
        yield from _RunTrace(run, label, process_id).events()


class _RunTrace:
    """Writes one run's events."""

    def __init__(self, run: ReportRun, label: str, process_id: int) -> None:
        self.run, self.label, self.process_id = run, label, process_id
        self.metrics = run.metrics
        self.origin_ns = _first_moment_ns(run.metrics)
        names = [instance.instance_id for instance in run_instances(run)]
        self.threads = {name: thread for thread, name in enumerate(names, start=FIRST_INSTANCE_THREAD)}
        self.spans: dict[InstanceId, Spans] = {
            name: step_spans_ns(timeline) for name, timeline in run.metrics.timelines.items()
        }

    def events(self) -> Iterator[str]:
        yield from self._names()
        for name, timeline in self.metrics.timelines.items():
            yield from self._steps(name, timeline)
            yield from self._counters(name, timeline)
        yield from self._counter("control plane queue", self.metrics.queue_time_ns, self.metrics.queue_depth)
        yield from self._requests()
        yield from self._transfers()
        yield from self._arrows()

    def _at(self, time_ns: int) -> str:
        """Nanoseconds as microseconds, written without rounding."""
        since_ns = time_ns - self.origin_ns
        return f"{since_ns // 1000}.{since_ns % 1000:03d}"

    def _names(self) -> Iterator[str]:
        title = f"{self.label}: {self.run.trace}, seed {self.run.seed}"
        yield self._name("process_name", 0, title)
        yield self._name("thread_name", NETWORK_THREAD, "network")
        roles = {instance.instance_id: instance.role for instance in run_instances(self.run)}
        for name, thread in self.threads.items():
            role = roles[name]
            yield self._name("thread_name", thread, f"{name} ({role})" if role else str(name))
            yield (
                f'{{"ph":"M","name":"thread_sort_index","pid":{self.process_id},"tid":{thread},'
                f'"args":{{"sort_index":{thread}}}}}'
            )

    def _name(self, what: str, thread: int, name: str) -> str:
        return (
            f'{{"ph":"M","name":"{what}","pid":{self.process_id},"tid":{thread},"args":{{"name":{json.dumps(name)}}}}}'
        )

    def _steps(self, name: InstanceId, timeline: InstanceTimeline) -> Iterator[str]:
        where = f'"pid":{self.process_id},"tid":{self.threads[name]}'
        repeats = timeline.num_repeats
        starts_ns, ends_ns = self.spans[name]
        for i, (start_ns, end_ns) in enumerate(zip(starts_ns, ends_ns, strict=True)):
            if i >= len(repeats):
                return  # It never came back.
            num_tokens, num_seqs = timeline.num_prefill_tokens[i], timeline.num_decode_seqs[i]
            kind = "prefill + decode" if num_tokens and num_seqs else "prefill" if num_tokens else "decode"
            length_ns = end_ns - start_ns
            yield (
                f'{{"ph":"X","cat":"step","name":"{kind}",{where},"ts":{self._at(start_ns)},'
                f'"dur":{length_ns // 1000}.{length_ns % 1000:03d},'
                f'"args":{{"prefill_tokens":{num_tokens},"decode_seqs":{num_seqs},"forward_passes":{repeats[i]}}}}}'
            )

    def _counters(self, name: InstanceId, timeline: InstanceTimeline) -> Iterator[str]:
        yield from self._counter(f"{name} running", timeline.time_ns, timeline.num_running)
        yield from self._counter(f"{name} waiting", timeline.time_ns, timeline.num_waiting)
        yield from self._counter(f"{name} KV blocks", timeline.time_ns, timeline.num_blocks_in_use)

    def _counter(self, name: str, times_ns: Sequence[int], values: Sequence[int]) -> Iterator[str]:
        """One event where the value changes."""
        head = f'{{"ph":"C","name":{json.dumps(name)},"pid":{self.process_id},"tid":0,"ts":'
        previous = None
        for time_ns, value in zip(times_ns, values, strict=True):
            if value != previous:
                yield f'{head}{self._at(time_ns)},"args":{{"value":{value}}}}}'
                previous = value

    def _requests(self) -> Iterator[str]:
        transfers: dict[RequestId, list[TransferRecord]] = defaultdict(list)
        for transfer in self.metrics.transfers:
            if transfer.end_ns is not None and not transfer.failed:
                transfers[transfer.request_id].append(transfer)
        for number, (request_id, record) in enumerate(self.metrics.requests.items()):
            if record.last_token_ns is None:
                yield self._without_tokens(record)
            else:
                yield from self._request(f"r{number}", record, transfers.get(request_id, []))

    def _without_tokens(self, record: RequestRecord) -> str:
        """A request that gave nothing is a moment, at its arrival."""
        outcome = "rejected" if record.reject_reason is not None else "no output"
        reason = record.reject_reason or record.finish_reason or "unfinished when the run ended"
        return (
            f'{{"ph":"i","s":"p","cat":"request","name":"{outcome}","pid":{self.process_id},"tid":0,'
            f'"ts":{self._at(record.request.arrival_ns)},'
            f'"args":{{"request_id":{json.dumps(record.request.request_id)},"reason":{json.dumps(reason)}}}}}'
        )

    def _request(self, async_id: str, record: RequestRecord, transfers: list[TransferRecord]) -> Iterator[str]:
        request = record.request
        last_ns = record.last_token_ns if record.last_token_ns is not None else request.arrival_ns
        arguments = {
            "request_id": request.request_id,
            "prompt_tokens": request.num_prompt_tokens,
            "cached_tokens": record.num_cached_tokens,
            "output_tokens": record.num_output_tokens,
            "prefill_instance": record.prefill_instance,
            "decode_instance": record.decode_instance,
            "finish_reason": record.finish_reason,
        }
        yield self._begin("request", "request", async_id, request.arrival_ns, arguments)
        for name, start_ns, end_ns in request_phases(record, transfers):
            yield self._begin("request", name, async_id, start_ns)
            yield self._end("request", name, async_id, end_ns)
        yield self._end("request", "request", async_id, last_ns)

    def _transfers(self) -> Iterator[str]:
        for number, transfer in enumerate(self.metrics.transfers):
            if transfer.end_ns is None:
                continue
            name = f"KV {transfer.source_instance} \u2192 {transfer.target_instance}"
            arguments = {
                "request_id": transfer.request_id,
                "bytes": transfer.num_bytes,
                "failed": transfer.failed,
            }
            yield self._begin("transfer", name, f"t{number}", transfer.start_ns, arguments)
            yield self._end("transfer", name, f"t{number}", transfer.end_ns)

    def _begin(
        self, category: str, name: str, async_id: str, time_ns: int, arguments: Mapping[str, object] | None = None
    ) -> str:
        more = f',"args":{json.dumps(arguments)}' if arguments else ""
        return self._async("b", category, name, async_id, time_ns) + more + "}"

    def _end(self, category: str, name: str, async_id: str, time_ns: int) -> str:
        return self._async("e", category, name, async_id, time_ns) + "}"

    def _async(self, phase: str, category: str, name: str, async_id: str, time_ns: int) -> str:
        thread = NETWORK_THREAD if category == "transfer" else 0
        return (
            f'{{"ph":"{phase}","cat":"{category}","name":{json.dumps(name)},"id2":{{"local":"{async_id}"}},'
            f'"pid":{self.process_id},"tid":{thread},"ts":{self._at(time_ns)}'
        )

    def _arrows(self) -> Iterator[str]:
        """Both ends of an arrow lie on the start of a step, so that the UI finds the slice they belong to."""
        for number, transfer in enumerate(self.metrics.transfers):
            source, target = self.spans.get(transfer.source_instance), self.spans.get(transfer.target_instance)
            if transfer.end_ns is None or transfer.failed or source is None or target is None:
                continue
            leaving = bisect_left(source[0], transfer.start_ns) - 1
            entering = bisect_left(target[0], transfer.end_ns)
            if leaving < 0 or entering == len(target[0]):
                continue
            arrow_id = self.process_id * 10**9 + number
            head = f'"cat":"hand-over","name":"hand-over","id":{arrow_id},"pid":{self.process_id}'
            yield (
                f'{{"ph":"s",{head},"tid":{self.threads[transfer.source_instance]},'
                f'"ts":{self._at(source[0][leaving])}}}'
            )
            yield (
                f'{{"ph":"f","bp":"e",{head},"tid":{self.threads[transfer.target_instance]},'
                f'"ts":{self._at(target[0][entering])}}}'
            )


def _first_moment_ns(metrics: RunMetrics) -> int:
    moments = [record.request.arrival_ns for record in metrics.requests.values()]
    moments += [timeline.time_ns[0] for timeline in metrics.timelines.values() if timeline.time_ns]
    moments += [transfer.start_ns for transfer in metrics.transfers]
    moments += metrics.queue_time_ns[:1]
    return min(moments, default=0)


def request_phases(record: RequestRecord, transfers: Sequence[TransferRecord]) -> list[tuple[str, int, int]]:
    """(name, start, end) of each phase of a request with output, in order; those without length are left out.

    A transfer that was streamed counts from the first token on.
    """
    scheduled_ns, first_ns, last_ns = record.first_scheduled_ns, record.first_token_ns, record.last_token_ns
    if scheduled_ns is None or first_ns is None or last_ns is None:
        return []
    phases = [("queued", record.request.arrival_ns, scheduled_ns), ("prefill", scheduled_ns, first_ns)]
    now_ns = first_ns
    for transfer in sorted(transfers, key=lambda transfer: transfer.start_ns):
        if transfer.end_ns is not None and now_ns < transfer.end_ns <= last_ns:
            phases.append(("transfer", max(now_ns, transfer.start_ns), transfer.end_ns))
            now_ns = transfer.end_ns
    phases.append(("decode", now_ns, last_ns))
    return [phase for phase in phases if phase[2] > phase[1]]
