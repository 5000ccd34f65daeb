"""What a client asks for, as the machines see it: integers, never text."""

from enum import StrEnum

import msgspec

from sagellm.core.identity import RequestId
from sagellm.core.sampling import SamplingParameters


class FinishReason(StrEnum):
    """How an accepted request ended. Each ends exactly once."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class LatencySLO(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Limits that one request must keep, all of them, to count towards goodput; None: no limit."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None


class RequestSpec(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One request.

    The prompt's identity, for prefix reuse, comes in one of two forms, or not at all:
    ``prompt_token_ids`` (its length is ``num_prompt_tokens``), or ``content_ids``, symbolic ids of
    which each stands for ``content_block_size`` prompt tokens (the last one for what is left over).
    Two content ids are equal only where the tokens, and all tokens before them, are equal.
    """

    request_id: RequestId
    arrival_ns: int
    num_prompt_tokens: int
    max_output_tokens: int
    priority: int = 0  # lower is more urgent, as in vLLM
    slo: LatencySLO = LatencySLO()
    prompt_token_ids: tuple[int, ...] | None = None
    content_ids: tuple[int, ...] = ()
    content_block_size: int = 0
    cache_salt: str = ""  # prefixes are shared only between requests of equal salt
    stop_token_ids: tuple[int, ...] = ()
    sampling: SamplingParameters | None = None  # None: greedy, or tokens are symbolic

    def __post_init__(self) -> None:
        if self.num_prompt_tokens < 1:
            raise ValueError(f"num_prompt_tokens: {self.num_prompt_tokens}, must be 1 or more")
        if self.max_output_tokens < 1:
            raise ValueError(f"max_output_tokens: {self.max_output_tokens}, must be 1 or more")
        token_ids = self.prompt_token_ids
        if token_ids is not None and len(token_ids) != self.num_prompt_tokens:
            raise ValueError(
                f"prompt_token_ids: {len(token_ids)} ids, but num_prompt_tokens is {self.num_prompt_tokens}"
            )
        if self.content_ids and self.content_block_size < 1:
            raise ValueError(f"content_block_size: {self.content_block_size}, must be 1 or more")
