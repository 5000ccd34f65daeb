"""The figures of a running server, folded from what passes through the front process."""

from dataclasses import dataclass
from itertools import pairwise

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import (
    AssignRequest,
    Effect,
    EmitTokens,
    Event,
    RejectRequest,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
)
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.server.engine import InstanceStatus
from sagellm.server.page.live_series import LiveSeries
from sagellm.server.prometheus.bucket_counts import (
    NUM_CHOICES,
    REQUEST_S,
    STEP_TOKENS,
    TOKEN_GAP_S,
    TTFT_S,
    TTFT_WITH_SLOS_S,
    BucketCounts,
    one_two_five,
)


@dataclass(slots=True)
class _RequestTimes:
    """What is kept of an unfinished request. Times are those of the front process."""

    num_prompt_tokens: int
    arrival_ns: int
    assigned_ns: int | None = None
    first_token_ns: int = 0
    last_token_ns: int = 0
    num_output_tokens: int = 0
    is_cancelled: bool = False


class LatencyHistograms:
    """Of requests, in seconds. A request counts in those of its parts that it came to."""

    def __init__(self) -> None:
        self.ttft = BucketCounts(TTFT_S)
        self.ttft_with_slos = BucketCounts(TTFT_WITH_SLOS_S)
        self.token_gap = BucketCounts(TOKEN_GAP_S)
        self.tpot = BucketCounts(TOKEN_GAP_S)
        self.end_to_end = BucketCounts(REQUEST_S)
        self.queue = BucketCounts(REQUEST_S)
        self.inference = BucketCounts(REQUEST_S)
        self.prefill = BucketCounts(REQUEST_S)
        self.decode = BucketCounts(REQUEST_S)


class SizeHistograms:
    """Of requests and steps, in tokens."""

    def __init__(self, max_model_len: int) -> None:
        bounds = one_two_five(max_model_len)
        self.prompt = BucketCounts(bounds)
        self.output = BucketCounts(bounds)
        self.max_tokens = BucketCounts(bounds)
        self.prefill_computed = BucketCounts(bounds)
        self.num_choices = BucketCounts(NUM_CHOICES)
        self.step = BucketCounts(STEP_TOKENS)


class ServingMetrics:
    """An `EngineObserver`. Make it first, hand it to the live driver and to `create_app`.

    It keeps something for each unfinished request only, so its memory is bounded by what is served.
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self.model_name = model_name
        self.latencies = LatencyHistograms()
        self.sizes = SizeHistograms(max_model_len)
        self.num_prompt_tokens = 0  # of requests that got their first token
        self.num_output_tokens = 0
        self.num_finished = dict.fromkeys(FinishReason, 0)
        self.num_rejected = {False: 0, True: 0}  # by whether trying again may help
        self.series = LiveSeries()
        self._requests: dict[RequestId, _RequestTimes] = {}
        self._statuses: dict[InstanceId, InstanceStatus] = {}

    @property
    def num_requests_kept(self) -> int:
        """Unfinished requests of which something is kept."""
        return len(self._requests)

    def observe(self, now_ns: int, record: Event | Effect) -> None:
        """An event or effect of the control plane, or tokens that go out to clients."""
        match record:
            case EmitTokens():
                self._emitted(now_ns, record)
            case RequestArrived(request=request):
                self._arrived(request)
            case AssignRequest(request=request):
                times = self._requests.get(request.request_id)
                if times is not None and times.assigned_ns is None:
                    times.assigned_ns = now_ns
            case RequestCancelled(request_id=request_id):
                times = self._requests.get(request_id)
                if times is not None:
                    times.is_cancelled = True
            case RejectRequest():
                self._rejected(now_ns, record)
            case RequestFinished():
                self._finished(now_ns, record)
            case _:
                pass

    def observe_status(self, now_ns: int, status: InstanceStatus) -> None:
        """An instance spoke of itself. Its steps since then count with the tokens that they had on average."""
        last = self._statuses.get(status.instance_id)
        self._statuses[status.instance_id] = status
        if last is None or status.num_steps <= last.num_steps:
            return
        num_steps = status.num_steps - last.num_steps
        num_tokens = status.num_prompt_tokens + status.num_output_tokens
        num_tokens -= last.num_prompt_tokens + last.num_output_tokens
        self.sizes.step.add(num_tokens / num_steps, num_steps)

    def observe_answer(self, num_choices: int, max_tokens: int, num_computed_prompt_tokens: int) -> None:
        """What only the HTTP side knows of a request, once its answers are over."""
        self.sizes.num_choices.add(num_choices)
        self.sizes.max_tokens.add(max_tokens)
        self.sizes.prefill_computed.add(num_computed_prompt_tokens)

    def _arrived(self, request: RequestSpec) -> None:
        self._requests.setdefault(request.request_id, _RequestTimes(request.num_prompt_tokens, request.arrival_ns))

    def _emitted(self, now_ns: int, emit: EmitTokens) -> None:
        ends_ns = emit.ends_ns
        inner_gaps = [later - earlier for earlier, later in pairwise(ends_ns)]
        gaps: dict[int, int] = {}  # how many requests had such a gap: in a batch most have the same
        num_tokens = 0
        for index, request_id in enumerate(emit.request_ids):
            times = self._requests.get(request_id)
            if times is None:
                continue
            count = len(ends_ns) if emit.token_ids is None else len(emit.token_ids[index])
            num_tokens += count
            if times.num_output_tokens:
                gap_ns = now_ns - times.last_token_ns
                gaps[gap_ns] = gaps.get(gap_ns, 0) + 1
            else:
                self._first_token(now_ns, times)
            for gap_ns in inner_gaps[: count - 1]:
                gaps[gap_ns] = gaps.get(gap_ns, 0) + 1
            times.num_output_tokens += count
            times.last_token_ns = now_ns
        self.num_output_tokens += num_tokens
        self.series.emitted(now_ns, num_tokens)
        for gap_ns, count in gaps.items():
            self.latencies.token_gap.add(gap_ns / 1e9, count)

    def _first_token(self, now_ns: int, times: _RequestTimes) -> None:
        times.first_token_ns = now_ns
        ttft_s = (now_ns - times.arrival_ns) / 1e9
        self.latencies.ttft.add(ttft_s)
        self.latencies.ttft_with_slos.add(ttft_s)
        self.num_prompt_tokens += times.num_prompt_tokens
        self.series.first_token(now_ns, ttft_s, times.num_prompt_tokens)

    def _rejected(self, now_ns: int, effect: RejectRequest) -> None:
        times = self._requests.pop(effect.request_id, None)
        if times is not None and times.is_cancelled:
            self.num_finished[FinishReason.ABORT] += 1
        else:
            self.num_rejected[effect.retryable] += 1
            self.series.rejected(now_ns)

    def _finished(self, now_ns: int, record: RequestFinished) -> None:
        times = self._requests.pop(record.request_id, None)
        if times is None:
            return
        self.num_finished[record.reason] += 1
        self.sizes.prompt.add(times.num_prompt_tokens)
        self.sizes.output.add(times.num_output_tokens)
        is_complete = record.reason is FinishReason.STOP or record.reason is FinishReason.LENGTH
        if is_complete and times.num_output_tokens:
            self._latencies(now_ns, times)

    def _latencies(self, now_ns: int, times: _RequestTimes) -> None:
        latencies, first_ns, last_ns = self.latencies, times.first_token_ns, times.last_token_ns
        assigned_ns = times.arrival_ns if times.assigned_ns is None else times.assigned_ns
        latencies.end_to_end.add((last_ns - times.arrival_ns) / 1e9)
        latencies.queue.add((assigned_ns - times.arrival_ns) / 1e9)
        latencies.inference.add((last_ns - assigned_ns) / 1e9)
        latencies.prefill.add((first_ns - assigned_ns) / 1e9)
        latencies.decode.add((last_ns - first_ns) / 1e9)
        tpot_s = None
        if times.num_output_tokens > 1:
            tpot_s = (last_ns - first_ns) / 1e9 / (times.num_output_tokens - 1)
            latencies.tpot.add(tpot_s)
        self.series.finished(now_ns, tpot_s)
