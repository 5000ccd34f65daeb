"""What each machine is told once, when it is made. Files are parsed elsewhere, at the edge."""

from dataclasses import dataclass
from enum import StrEnum

from sagellm.core.identity import InstanceId


class Role(StrEnum):
    """What an instance is for. Any instance can compute any token; the role says what it is given."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


class HandoverStart(StrEnum):
    """When a prefill instance's KV starts to move."""

    AT_END = "at_end"  # the decode instance is chosen when prefill ends
    STREAMED = "streamed"  # it is chosen on arrival, and full blocks move after each chunk


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """One instance's limits."""

    instance_id: InstanceId
    num_blocks: int
    role: Role = Role.MIXED
    block_size: int = 16  # tokens
    kv_bytes_per_token: int = 0  # over all ranks of the instance
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_num_chunks: int = 0  # prompts of which one step computes some; 0: as many as max_num_seqs
    max_chunk_tokens: int = 0  # of one prompt in one step; 0: as many as the step has room for
    steps_in_flight_max: int = 2
    plan_lead_ns: int = 0
    """The second step in flight is planned so long, and longer where there are many sequences, before the first is
    expected to end; 0: as soon as it can be."""
    prefix_caching: bool = True
    eviction: str = "lru"
    watermark_blocks: int = 0  # free blocks kept back when a waiting request is admitted
    repeat_max: int = 1 << 30  # 1 turns fast-forward off
    step_attempts_max: int = 3  # a request whose steps failed so often ends with an error
    transfer_timeout_ns: int = 30_000_000_000
    transfer_attempts_max: int = 2  # to one and the same decode instance

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "repeat_max", "steps_in_flight_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more")
        for name in ("max_num_chunks", "max_chunk_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, must be 1 or more, or 0 for no limit of its own")
        if self.steps_in_flight_max > 2:
            raise ValueError(f"steps_in_flight_max: {self.steps_in_flight_max}, must be 1 or 2")
        if self.plan_lead_ns < 0:
            raise ValueError(f"plan_lead_ns: {self.plan_lead_ns}, must be 0 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens}, must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running request gets its token in every step"
            )

    @property
    def num_token_slots(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class ControlPlaneConfig:
    """How requests are queued, ordered and routed."""

    strategy: str = "fifo"
    routing: str = "least_loaded"
    queue_max: int = 100_000  # requests; beyond it arrivals are rejected
    dispatch_tokens_max: int = 0
    """Prompt tokens that an instance may hold not yet prefilled before the rest waits here, in the
    strategy's order. One request is always let through. 0: as many as four of its steps compute, so
    that two steps in flight and the next one find work, and little is out of the strategy's hands."""
    handover_start: HandoverStart = HandoverStart.AT_END
    disaggregate_min_tokens: int = 0
    """A request whose uncached prompt is shorter is prefilled where it decodes."""
    attempts_max: int = 3  # a request is re-run on another instance so often less one
    max_model_len: int = 0  # prompt and output tokens of one request together; 0: as KV allows
