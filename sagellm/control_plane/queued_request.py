"""A request in the control plane's queue, as strategies see it."""

from __future__ import annotations

from sagellm.core.identity import RequestId
from sagellm.core.request import FinishReason, RequestSpec


class QueuedRequest:
    """What of a request is asked for again and again, and what is left of it to run.

    ``num_output_tokens`` were already sent to the client by an instance that is gone.
    """

    __slots__ = (
        "ahead",
        "arrival_ns",
        "behind",
        "num_output_tokens",
        "num_prompt_tokens",
        "num_slots",
        "output_token_ids",
        "request_id",
        "spec",
    )

    def __init__(self, spec: RequestSpec) -> None:
        self.spec = spec
        self.request_id: RequestId = spec.request_id
        self.arrival_ns: int = spec.arrival_ns
        self.num_prompt_tokens: int = spec.num_prompt_tokens
        self.num_slots: int = self.num_prompt_tokens + spec.max_output_tokens  # KV tokens, once it is complete
        self.num_output_tokens = 0
        self.output_token_ids: tuple[int, ...] | None = None
        self.ahead: QueuedRequest | None = None  # its neighbours in a `FifoStrategy`
        self.behind: QueuedRequest | None = None

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens whose KV must be there before the next one can come."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def end_of_output(self) -> FinishReason | None:
        """Why nothing more is to come of a request that was running; None: there is."""
        if self.output_token_ids and self.output_token_ids[-1] in self.spec.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_prefill_tokens >= self.num_slots else None

    @property
    def ttft_deadline_ns(self) -> int | None:
        """By when the first token must be out; None without a limit."""
        ttft_ns = self.spec.slo.ttft_ns
        return None if ttft_ns is None else self.arrival_ns + ttft_ns


class QueueOutlook:
    """What a strategy may know besides the queue itself."""

    __slots__ = ("now_ns", "prefill_ns_per_token")

    def __init__(self, now_ns: int, prefill_ns_per_token: float) -> None:
        self.now_ns = now_ns
        self.prefill_ns_per_token = prefill_ns_per_token  # lately, from dispatch to first token; 0.0: none yet
