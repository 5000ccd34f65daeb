"""A request in the control plane's queue, as strategies see it."""

from sagellm.core.identity import RequestId
from sagellm.core.request import FinishReason, RequestSpec


class QueuedRequest:
    """``num_output_tokens`` were already sent to the client by an instance that is gone."""

    __slots__ = ("num_output_tokens", "num_prefill_tokens", "output_token_ids", "request_id", "spec")

    def __init__(
        self, spec: RequestSpec, num_output_tokens: int = 0, output_token_ids: tuple[int, ...] | None = None
    ) -> None:
        self.spec = spec
        self.num_output_tokens = num_output_tokens
        self.output_token_ids = output_token_ids
        self.request_id: RequestId = spec.request_id
        self.num_prefill_tokens: int = spec.num_prompt_tokens + num_output_tokens

    @property
    def end_of_output(self) -> FinishReason | None:
        """Why nothing more is to come of a request that was running; None: there is."""
        if self.output_token_ids and self.output_token_ids[-1] in self.spec.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_output_tokens >= self.spec.max_output_tokens else None

    @property
    def ttft_deadline_ns(self) -> int | None:
        """By when the first token must be out; None without a limit."""
        ttft_ns = self.spec.slo.ttft_ns
        return None if ttft_ns is None else self.spec.arrival_ns + ttft_ns


class QueueOutlook:
    """What a strategy may know besides the queue itself."""

    __slots__ = ("now_ns", "prefill_ns_per_token")

    def __init__(self, now_ns: int, prefill_ns_per_token: float) -> None:
        self.now_ns = now_ns
        self.prefill_ns_per_token = prefill_ns_per_token  # lately, from dispatch to first token; 0.0: none yet
