"""A request in the control plane's queue, as strategies see it."""

from dataclasses import dataclass

from sagellm.core.identity import RequestId
from sagellm.core.request import FinishReason, RequestSpec


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """``num_output_tokens`` were already sent to the client by an instance that is gone."""

    spec: RequestSpec
    num_output_tokens: int = 0
    output_token_ids: tuple[int, ...] | None = None

    @property
    def request_id(self) -> RequestId:
        return self.spec.request_id

    @property
    def num_prefill_tokens(self) -> int:
        return self.spec.num_prompt_tokens + self.num_output_tokens

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


@dataclass(frozen=True, slots=True)
class QueueOutlook:
    """What a strategy may know besides the queue itself."""

    now_ns: int
    prefill_ns_per_token: float  # lately, from dispatch to first token; 0.0 until there was one
