"""Where the time of serving goes, step by step: the host's threads and the device on one time line.

    python -m benchmarks.h200.step_timeline OUT_FOLDER --trace conv.csv --rate 16 --limit 200

Runs one instance (machine, executor, device) in this process, without a front, on a trace with the times of its
arrivals. Each step leaves when the machine asked for it, when the host began and ended its launch, when the device
began and ended it, and when its report came. Prints a table by kind of step, with the device's idle time, and writes
``timeline.json``, which the Perfetto UI opens. ``--idle`` sends the next request when the one before it has ended.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from backends.executor_settings import ExecutorSettings
from backends.model_runner.torch_executor import TorchStepExecutor
from backends.streams import DeviceEvent
from sagellm.cluster.reading import read_cluster
from sagellm.core.identity import InstanceId, RequestId, StepId
from sagellm.core.messages import AssignRequest, EmitTokens, RequestFinished, RunStep
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.sampling import GREEDY
from sagellm.core.step_executor import StepOutcome
from sagellm.server.live.deployment import ModelChoice, deploy
from sagellm.server.live.instance_driver import DriverOptions, InstanceDriver
from sagellm.server.live.instance_process import SWITCH_INTERVAL_S
from sagellm.server.live.wire import Deliver, FromInstance, PeerMessage, Turn
from traces.reader import read_trace
from traces.request_trace import TraceRequest
from traces.shaping import limit, set_rate

TOKEN_IDS_END = 200


@dataclass(slots=True)
class StepTimes:
    """One step. All in nanoseconds of the host's clock."""

    num_decodes: int
    num_prompt_tokens: int
    asked_ns: int
    launch_begin_ns: int = 0
    launch_end_ns: int = 0
    device_begin_ns: int = 0
    device_end_ns: int = 0
    reported_ns: int = 0

    @property
    def kind(self) -> str:
        if not self.num_prompt_tokens:
            return "decode"
        magnitude = 1 << max(7, (self.num_prompt_tokens - 1).bit_length())
        return f"{'mixed' if self.num_decodes else 'prompt'} up to {magnitude}"


class TimedExecutor(TorchStepExecutor):
    """A `TorchStepExecutor` that notes when things happen."""

    def __init__(self, settings: ExecutorSettings) -> None:
        super().__init__(settings)
        self.steps: dict[StepId, StepTimes] = {}
        self._events: dict[StepId, tuple[DeviceEvent, DeviceEvent]] = {}
        self._base: DeviceEvent | None = None
        self._base_ns = 0

    def start(self, on_outcome: Callable[[StepOutcome], None], on_dead: Callable[[str], None]) -> None:
        def reported(outcome: StepOutcome) -> None:
            self.steps[outcome.event.step_id].reported_ns = time.monotonic_ns()
            on_outcome(outcome)

        super().start(reported, on_dead)

    def launch(self, step: RunStep) -> None:
        plan = step.plan
        num_prompt_tokens = sum(chunk.num_tokens for chunk in plan.chunks)
        self.steps[step.step_id] = StepTimes(len(plan.decode_request_ids), num_prompt_tokens, time.monotonic_ns())
        super().launch(step)

    def _run_step(self, step: RunStep) -> None:
        if self._base is None:
            self._base = self._mark()
            self._base.synchronize()
            self._base_ns = time.monotonic_ns()
        times = self.steps[step.step_id]
        times.launch_begin_ns = time.monotonic_ns()
        begin = self._mark()
        super()._run_step(step)
        self._events[step.step_id] = begin, self._mark()
        times.launch_end_ns = time.monotonic_ns()

    def _mark(self) -> DeviceEvent:
        event = self._backend.create_event(enable_timing=True, device_index=self._device_index)
        event.record()
        return event

    def finished_steps(self) -> list[StepTimes]:
        """All steps in order, with the device's times."""
        if self._base is None:
            return []
        for step_id, (begin, end) in self._events.items():
            times = self.steps[step_id]
            times.device_begin_ns = self._base_ns + round(self._base.elapsed_ms(begin) * 1e6)
            times.device_end_ns = self._base_ns + round(self._base.elapsed_ms(end) * 1e6)
        return [self.steps[step_id] for step_id in sorted(self._events)]


@dataclass(slots=True)
class RequestTimes:
    """What a client next to the instance would see."""

    sent_ns: int
    num_output_tokens: int
    token_ns: list[int] = field(default_factory=list)


class Client:
    """Sends the requests, and takes what the instance says. An `InstanceOutbox`."""

    def __init__(self, instance_id: InstanceId, requests: list[TraceRequest], one_by_one: bool) -> None:
        self._instance_id = instance_id
        self._waiting = list(reversed(requests))
        self._one_by_one = one_by_one
        self._begin_ns = 0
        self.requests: dict[RequestId, RequestTimes] = {}
        self.num_unfinished = len(requests)

    def begin(self) -> None:
        """Arrivals count from now on."""
        self._begin_ns = time.monotonic_ns()

    def due(self) -> Deliver | None:
        """What is to be sent by now."""
        now_ns = time.monotonic_ns()
        assigned = []
        while self._waiting and self._is_due(now_ns):
            request = self._waiting.pop()
            request_id = RequestId(f"r{len(self.requests)}")
            sent_ns = now_ns if self._one_by_one else self._begin_ns + request.arrival_ns
            self.requests[request_id] = RequestTimes(sent_ns, request.num_output_tokens)
            ids = tuple(
                (len(self.requests) * 7919 + index) % TOKEN_IDS_END for index in range(request.num_prompt_tokens)
            )
            spec = RequestSpec(
                request_id, now_ns, len(ids), request.num_output_tokens, prompt_token_ids=ids, sampling=GREEDY
            )
            assigned.append(AssignRequest(self._instance_id, spec))
        return Deliver(tuple(assigned)) if assigned else None

    def _is_due(self, now_ns: int) -> bool:
        if self._one_by_one:
            return self.num_unfinished == len(self._waiting)
        return self._begin_ns + self._waiting[-1].arrival_ns <= now_ns

    def wait_s(self) -> float:
        """Until the next one is due."""
        if not self._waiting or self._one_by_one:
            return 1.0
        return max(0.0, (self._begin_ns + self._waiting[-1].arrival_ns - time.monotonic_ns()) / 1e9)

    def to_front(self, message: FromInstance) -> None:
        if not isinstance(message, Turn):
            raise RuntimeError(f"the instance said {message}")
        now_ns = time.monotonic_ns()
        for effect in message.effects:
            if isinstance(effect, RequestFinished) and effect.reason is FinishReason.ERROR:
                raise RuntimeError(f"request {effect.request_id} failed")
            if isinstance(effect, EmitTokens):
                for request_id in effect.request_ids:
                    request = self.requests[request_id]
                    request.token_ns.append(now_ns)
                    self.num_unfinished -= len(request.token_ns) == request.num_output_tokens

    def to_peer(self, peer_id: InstanceId, message: PeerMessage) -> None:
        raise AssertionError("one instance has no peers")

    def forget_peer(self, peer_id: InstanceId) -> None: ...


def run(settings: ExecutorSettings, requests: list[TraceRequest], one_by_one: bool) -> tuple[list[StepTimes], Client]:
    executor = TimedExecutor(settings)
    woken = threading.Event()
    client = Client(settings.instance.instance_id, requests, one_by_one)
    driver = InstanceDriver(settings.instance, executor, client, DriverOptions())
    driver.start(woken.set)
    client.begin()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with_progress = sys.stderr.isatty()
    while client.num_unfinished:
        woken.wait(min(driver.wait_s(), client.wait_s()))
        woken.clear()
        message = client.due()
        if message is not None:
            driver.take(message)
        driver.turn()
        if with_progress:
            print(f"\r{client.num_unfinished:5} unfinished ", end="", file=sys.stderr)
    steps = executor.finished_steps()
    driver.close()
    return steps, client


@dataclass(frozen=True, slots=True)
class KindRow:
    """Medians over the steps of one kind, in milliseconds."""

    kind: str
    num_steps: int
    tokens: float
    device_ms: float
    launch_ms: float
    asked_to_launch_ms: float
    report_ms: float  # from the device's end to the report
    idle_ms: float  # before it, while there was work
    idle_total_ms: float


def table(steps: list[StepTimes]) -> list[KindRow]:
    # Between a step's end and the next one there was work only where that one was asked for before the end's report.
    by_kind: dict[str, list[tuple[StepTimes, int]]] = {}
    for before, step in pairwise(steps):
        has_work = step.asked_ns < before.reported_ns + 2_000_000
        idle_ns = max(0, step.device_begin_ns - before.device_end_ns) if has_work else 0
        by_kind.setdefault(step.kind, []).append((step, idle_ns))
    return [row_of(kind, found) for kind, found in sorted(by_kind.items())]


def row_of(kind: str, found: list[tuple[StepTimes, int]]) -> KindRow:
    def median_ms(durations_ns: Iterable[int]) -> float:
        return statistics.median(durations_ns) / 1e6

    return KindRow(
        kind=kind,
        num_steps=len(found),
        tokens=statistics.median(step.num_decodes + step.num_prompt_tokens for step, _ in found),
        device_ms=median_ms(step.device_end_ns - step.device_begin_ns for step, _ in found),
        launch_ms=median_ms(step.launch_end_ns - step.launch_begin_ns for step, _ in found),
        asked_to_launch_ms=median_ms(step.launch_begin_ns - step.asked_ns for step, _ in found),
        report_ms=median_ms(step.reported_ns - step.device_end_ns for step, _ in found),
        idle_ms=median_ms(idle_ns for _, idle_ns in found),
        idle_total_ms=sum(idle_ns for _, idle_ns in found) / 1e6,
    )


def latencies(client: Client) -> str:
    requests = [each for each in client.requests.values() if each.token_ns]
    ttft = sorted((each.token_ns[0] - each.sent_ns) / 1e6 for each in requests)
    tpot = sorted(
        (each.token_ns[-1] - each.token_ns[0]) / 1e6 / (len(each.token_ns) - 1)
        for each in requests
        if len(each.token_ns) > 1
    )
    span_s = (max(each.token_ns[-1] for each in requests) - min(each.sent_ns for each in requests)) / 1e9
    rate = sum(len(each.token_ns) for each in requests) / span_s

    def quantiles(values: list[float]) -> str:
        return " / ".join(f"{values[min(len(values) - 1, int(q * len(values)))]:.2f}" for q in (0.5, 0.9, 0.99))

    return f"TTFT p50/p90/p99 {quantiles(ttft)} ms, TPOT {quantiles(tpot)} ms, {rate:,.0f} output tokens/s"


def trace_events(steps: list[StepTimes]) -> list[dict[str, object]]:
    """The time line in the trace-event form that Perfetto reads."""
    begin_ns = min(step.asked_ns for step in steps)
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}}
        for tid, name in enumerate(("asked, waiting for the host", "host launches", "device", "report"), start=1)
    ]
    for number, step in enumerate(steps):
        stretches = (
            (1, step.asked_ns, step.launch_begin_ns),
            (2, step.launch_begin_ns, step.launch_end_ns),
            (3, step.device_begin_ns, step.device_end_ns),
            (4, step.device_end_ns, step.reported_ns),
        )
        arguments = {"step": number, "decodes": step.num_decodes, "prompt tokens": step.num_prompt_tokens}
        for tid, from_ns, to_ns in stretches:
            place = {"ph": "X", "pid": 1, "tid": tid, "ts": (from_ns - begin_ns) / 1e3}
            events.append(place | {"name": step.kind, "dur": max(0, to_ns - from_ns) / 1e3, "args": arguments})
    return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trace", required=True)
    parser.add_argument("--rate", type=float, default=16.0)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--cluster", default="h200x1", help="of one instance: a file, or a known name")
    parser.add_argument("--model", default="", help="instead of the cluster's")
    arguments = parser.parse_args()
    cluster = read_cluster(arguments.cluster)
    if arguments.model:
        cluster = cluster.model_copy(update={"model": arguments.model})
    deployment = deploy(cluster, ModelChoice("dummy"))
    trace = set_rate(limit(read_trace(arguments.trace, seed=0), arguments.limit), arguments.rate)
    steps, client = run(deployment.instances[0].settings, list(trace.requests), arguments.idle)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "timeline.json").write_text(json.dumps({"traceEvents": trace_events(steps)}), encoding="utf-8")
    print(latencies(client))
    titles = ("steps", "tokens", "device", "launch", "waits", "report", "idle", "idle, all")
    print(f"{'kind':20}" + "".join(f"{title:>10}" for title in titles))
    for row in table(steps):
        print(
            f"{row.kind:20}{row.num_steps:10}{row.tokens:10.0f}{row.device_ms:10.2f}{row.launch_ms:10.2f}"
            f"{row.asked_to_launch_ms:10.2f}{row.report_ms:10.2f}{row.idle_ms:10.2f}{row.idle_total_ms:10.1f}"
        )
    busy_ms = sum(step.device_end_ns - step.device_begin_ns for step in steps) / 1e6
    span_ms = (steps[-1].device_end_ns - steps[0].device_begin_ns) / 1e6
    print(f"device busy {busy_ms:.0f} of {span_ms:.0f} ms")


if __name__ == "__main__":
    main()
