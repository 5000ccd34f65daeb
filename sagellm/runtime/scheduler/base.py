"""What goes in and out of a scheduler that is called rather than run: requests, batches, migrations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from sagellm.core.identity import RequestId, TransferId
from sagellm.core.request import FinishReason, LatencySLO, RequestSpec


class RequestPriority(IntEnum):
    """Classes of urgency; lower is more urgent, as everywhere in sageLLM."""

    URGENT = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class RequestStatus(StrEnum):
    """Where a request stands."""

    WAITING = "waiting"  # in a queue, nothing computed
    PREFILLING = "prefilling"  # some of its prompt is in a batch, or has been
    MIGRATING = "migrating"  # prefilled; its KV waits for, or is on, its way to a decode device
    DECODING = "decoding"
    PREEMPTED = "preempted"  # its KV was given up or lost; it waits to be computed again
    FINISHED = "finished"
    REJECTED = "rejected"  # it can never be served, or the queue is full


class BatchPhase(StrEnum):
    """What a batch computes."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as a caller states it.

    ``priority`` orders the queue under the strategies ``priority`` and ``adaptive``; ``slo`` under
    ``slo_aware`` and ``adaptive``. How tokens are sampled is no concern of a scheduler, so there are no
    fields for it. Raises ValueError for an empty prompt or less than one token to make.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    max_new_tokens: int = 256
    priority: int = RequestPriority.NORMAL
    stop_token_ids: Sequence[int] = ()
    slo: LatencySLO = field(default=LatencySLO())
    cache_salt: str = ""  # prefixes are shared only between requests of equal salt

    def __post_init__(self) -> None:
        if not self.request_id:
            raise ValueError("request_id: '', must not be empty")
        object.__setattr__(self, "prompt_token_ids", tuple(self.prompt_token_ids))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not self.prompt_token_ids:
            raise ValueError(f"prompt_token_ids: [] of request {self.request_id!r}, must have 1 token or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} of request {self.request_id!r}, must be 1 or more")

    def spec(self, arrival_ns: int) -> RequestSpec:
        """The same request in the machines' words."""
        return RequestSpec(
            request_id=RequestId(self.request_id),
            arrival_ns=arrival_ns,
            num_prompt_tokens=len(self.prompt_token_ids),
            max_output_tokens=self.max_new_tokens,
            priority=int(self.priority),
            slo=self.slo,
            prompt_token_ids=tuple(self.prompt_token_ids),
            cache_salt=self.cache_salt,
            stop_token_ids=tuple(self.stop_token_ids),
        )


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """One request's share of a batch.

    The device computes ``token_ids``, which are the request's tokens from position
    ``num_computed_tokens`` on; it writes their KV to, and reads that of earlier tokens from, the
    blocks of ``block_table``: position p is in slot ``p % block_size`` of block ``block_table[p //
    block_size]``. Where ``samples`` is true a new token comes out after the last of them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_computed_tokens: int
    samples: bool
    block_table: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The size of the chunk; 1 for a decode."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass of one device."""

    batch_id: int
    device_id: int
    phase: BatchPhase
    entries: tuple[BatchEntry, ...]

    @property
    def num_requests(self) -> int:
        return len(self.entries)

    @property
    def num_tokens(self) -> int:
        """Tokens that the pass computes, over all its requests."""
        return sum(entry.num_tokens for entry in self.entries)

    @property
    def request_ids(self) -> tuple[str, ...]:
        return tuple(entry.request_id for entry in self.entries)

    @property
    def sampled_request_ids(self) -> tuple[str, ...]:
        """The requests that get a new token, in the order in which completing the batch takes them."""
        return tuple(entry.request_id for entry in self.entries if entry.samples)


@dataclass(frozen=True, slots=True)
class KVMigrationTask:
    """KV blocks to copy between devices: ``source_block_ids[i]`` goes to ``target_block_ids[i]``."""

    transfer_id: TransferId
    request_id: str
    source_device_id: int
    target_device_id: int
    source_block_ids: tuple[int, ...]
    target_block_ids: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """What has become of a request so far. Times are those of the scheduler's clock."""

    request: Request
    status: RequestStatus
    device_id: int | None  # that computed it last, or holds its KV
    output_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    reject_reason: str | None
    arrival_ns: int
    first_token_ns: int | None
    last_token_ns: int | None

    @property
    def ttft_ns(self) -> int | None:
        """First token time minus arrival; None before the first token."""
        return None if self.first_token_ns is None else self.first_token_ns - self.arrival_ns


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    """Counts since the scheduler was made. Batches and tokens count when their batch is completed."""

    num_requests: int
    num_unfinished: int
    num_completed: int  # ended by length or a stop token
    num_aborted: int
    num_failed: int
    num_rejected: int
    num_prefill_batches: int
    num_decode_batches: int
    num_mixed_batches: int
    num_prefill_tokens: int  # tokens computed in chunks, those computed again included
    num_decode_tokens: int
    num_preemptions: int
    num_migrations: int  # transfers that succeeded
    num_migrated_bytes: int
    mean_ttft_ns: float | None  # over requests that have a first token
