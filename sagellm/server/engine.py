"""What the HTTP side asks of the live driver: requests of integers in, tokens and one outcome out."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import msgspec

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import Effect, Event
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.step_executor import TokenLogprobs


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """Tokens that a request got since the last delta. A reader that is slow gets fewer and longer ones."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # one for each token; empty where none were asked for
    num_cached_tokens: int  # of the prompt, found in a prefix cache


class Refusal(StrEnum):
    """What keeps a request from being served."""

    IMPOSSIBLE = "impossible"  # it asks for more than can ever be
    QUEUE_FULL = "queue_full"  # too many are before it; later there may be room
    UNAVAILABLE = "unavailable"  # instances were lost, or the server stops; later or elsewhere it may be served


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """How a request ended: the last thing that its stream gives, exactly once.

    It has a ``reason`` where it ran to some end, and a ``refusal`` where it was rejected, be it after output.
    """

    reason: FinishReason | None
    message: str = ""  # why, where it was rejected or failed
    refusal: Refusal | None = None


class InstanceStatus(msgspec.Struct, frozen=True, tag=True):
    """What one instance says of itself from time to time. Counts run from its start."""

    instance_id: InstanceId
    num_running: int
    num_waiting: int
    num_blocks_in_use: int
    num_steps: int
    num_prompt_tokens: int  # computed
    num_output_tokens: int
    num_preemptions: int
    num_prefix_query_tokens: int  # prompt tokens looked up in the prefix cache
    num_prefix_hit_tokens: int
    core_ns: int  # spent in the machine's handle and poll


@dataclass(frozen=True, slots=True)
class InstanceSnapshot:
    """One instance as the front process knows it."""

    instance_id: InstanceId
    role: Role
    device: str
    num_blocks: int
    block_size: int
    max_num_seqs: int
    is_lost: bool
    status: InstanceStatus


class EngineObserver(Protocol):
    """Hears what passes through the front process, in order; keeps no record of every token."""

    def observe(self, now_ns: int, record: Event | Effect) -> None:
        """An event or effect of the control plane, or tokens that go out to clients."""

    def observe_status(self, now_ns: int, status: InstanceStatus) -> None:
        """An instance spoke of itself."""


class Engine(Protocol):
    """The live driver as the HTTP side sees it. All calls are made on the event loop's thread."""

    def now_ns(self) -> int:
        """The clock of all times, monotonic."""

    def submit(self, request: RequestSpec) -> AsyncIterator[OutputDelta | RequestOutcome]:
        """Serve a request, its id not in use. Ends with a `RequestOutcome`.

        Whoever stops reading must call `cancel`.
        """

    def cancel(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        """The client is gone, or has all that it wanted. Nothing is done where the request is over."""

    @property
    def is_alive(self) -> bool:
        """False where no instance is left."""

    @property
    def is_draining(self) -> bool:
        """True where no new request is taken."""

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not over."""

    @property
    def num_queued(self) -> int:
        """Of these, those that wait in the control plane."""

    def snapshots(self) -> tuple[InstanceSnapshot, ...]:
        """All instances, lost ones too, in the cluster file's order."""

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, let what runs end for so long, abort the rest, and stop all instances."""
