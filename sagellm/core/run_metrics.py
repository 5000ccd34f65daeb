"""What a run came to: the values that the fold over its log yields. See ``metrics.py`` for the fold."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec


class RequestRecord:
    """One request's life, from the log. Times are those of the run's clock, in nanoseconds."""

    __slots__ = (
        "decode_instance",
        "finish_reason",
        "first_scheduled_ns",
        "first_token_ns",
        "last_token_ns",
        "num_cached_tokens",
        "num_output_tokens",
        "prefill_instance",
        "reject_reason",
        "request",
        "was_assigned",
    )

    def __init__(
        self,
        request: RequestSpec,
        *,
        num_output_tokens: int = 0,
        num_cached_tokens: int = 0,
        first_scheduled_ns: int | None = None,
        first_token_ns: int | None = None,
        last_token_ns: int | None = None,
        prefill_instance: InstanceId | None = None,
        decode_instance: InstanceId | None = None,
        finish_reason: FinishReason | None = None,
        reject_reason: str | None = None,
    ) -> None:
        self.request = request
        self.num_output_tokens = num_output_tokens
        self.num_cached_tokens = num_cached_tokens  # prompt tokens taken from a prefix cache
        self.first_scheduled_ns = first_scheduled_ns
        self.first_token_ns = first_token_ns
        self.last_token_ns = last_token_ns
        self.prefill_instance = prefill_instance
        self.decode_instance = decode_instance
        self.finish_reason = finish_reason
        self.reject_reason = reject_reason
        self.was_assigned = False  # to an instance: it has left the queue

    @property
    def ttft_ns(self) -> int | None:
        """First token time minus arrival, as the client sees them."""
        if self.first_token_ns is None:
            return None
        return self.first_token_ns - self.request.arrival_ns

    @property
    def e2el_ns(self) -> int | None:
        """Last token time minus arrival; None unless the request ended with stop or length."""
        if self.finish_reason is not FinishReason.LENGTH and self.finish_reason is not FinishReason.STOP:
            return None
        if self.last_token_ns is None:
            return None
        return self.last_token_ns - self.request.arrival_ns

    @property
    def tpot_ns(self) -> float | None:
        """(E2E - TTFT) / (output tokens - 1); None at one token, where it is undefined."""
        e2el_ns, ttft_ns = self.e2el_ns, self.ttft_ns
        if e2el_ns is None or ttft_ns is None or self.num_output_tokens < 2:
            return None
        return (e2el_ns - ttft_ns) / (self.num_output_tokens - 1)

    def meets_slo(self) -> bool:
        """True where the request completed within all its limits; a single token passes any TPOT limit."""
        ttft_ns, tpot_ns, slo = self.ttft_ns, self.tpot_ns, self.request.slo
        if self.e2el_ns is None or ttft_ns is None:
            return False
        if slo.ttft_ns is not None and ttft_ns > slo.ttft_ns:
            return False
        return slo.tpot_ns is None or tpot_ns is None or tpot_ns <= slo.tpot_ns


@dataclass(slots=True)
class InstanceTimeline:
    """One instance over time: one entry per ``RunStep``, in columns.

    The last two columns lack entries for steps that never came back.
    """

    time_ns: array[int] = field(default_factory=lambda: array("q"))
    num_running: array[int] = field(default_factory=lambda: array("q"))
    num_waiting: array[int] = field(default_factory=lambda: array("q"))
    num_blocks_in_use: array[int] = field(default_factory=lambda: array("q"))
    num_prefill_tokens: array[int] = field(default_factory=lambda: array("q"))
    num_decode_seqs: array[int] = field(default_factory=lambda: array("q"))
    end_ns: array[int] = field(default_factory=lambda: array("q"))  # of the last repetition
    num_repeats: array[int] = field(default_factory=lambda: array("q"))  # forward passes; 0: it failed


@dataclass(slots=True)
class TransferRecord:
    """One KV transfer."""

    request_id: RequestId
    source_instance: InstanceId
    target_instance: InstanceId
    num_bytes: int
    start_ns: int
    end_ns: int | None = None
    failed: bool = False


@dataclass(slots=True)
class RunMetrics:
    """All that the fold yields."""

    requests: dict[RequestId, RequestRecord] = field(default_factory=dict)
    timelines: dict[InstanceId, InstanceTimeline] = field(default_factory=dict)
    transfers: list[TransferRecord] = field(default_factory=list)
    num_steps: int = 0  # forward passes, repetitions counted
    num_preemptions: int = 0
    num_prompt_tokens_queried: int = 0  # prompt tokens of admitted requests, for the prefix-hit ratio
    num_prompt_tokens_hit: int = 0
    # Gaps between consecutive tokens of one request: itl_ns[i] occurred itl_count[i] times.
    itl_ns: array[int] = field(default_factory=lambda: array("q"))
    itl_count: array[int] = field(default_factory=lambda: array("q"))
    # Requests in the control plane's queue, and when that number changed.
    queue_time_ns: array[int] = field(default_factory=lambda: array("q"))
    queue_depth: array[int] = field(default_factory=lambda: array("q"))
