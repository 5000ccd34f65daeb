"""What the front and the instances say to each other beside the core's own messages.

Everything that one machine says to another goes through the front, in order: so nothing overtakes
what caused it. KV alone goes directly from instance to instance.
"""

import msgspec

from sagellm.core.identity import BlockId, InstanceId, RequestId, StepId, TransferId
from sagellm.core.messages import (
    EmitTokens,
    HandoverFinished,
    KVReserved,
    MessageToControlPlane,
    MessageToInstance,
    ReleaseKV,
)
from sagellm.core.step_executor import TokenLogprobs
from sagellm.server.engine import InstanceStatus

# --- front to instance -----------------------------------------------------------------------------


class Deliver(msgspec.Struct, frozen=True, tag=True):
    """Messages of other machines, in the order in which they were sent."""

    messages: tuple[MessageToInstance, ...]


class PeerLost(msgspec.Struct, frozen=True, tag=True):
    """That instance is gone: nothing comes from it any more, and nothing reaches it."""

    instance_id: InstanceId


class PeerBack(msgspec.Struct, frozen=True, tag=True):
    """That instance was lost and runs again, knowing nothing of what was: its ``incarnation`` is that number."""

    instance_id: InstanceId
    incarnation: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave."""


ToInstance = Deliver | PeerLost | PeerBack | Stop

# --- instance to front -----------------------------------------------------------------------------

OutgoingEffect = EmitTokens | KVReserved | HandoverFinished | ReleaseKV | MessageToControlPlane
"""What an instance's poll gives that others must hear of."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """Ready to run steps."""

    instance_id: InstanceId


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """It will never run a step; ``reason`` is one sentence."""

    instance_id: InstanceId
    reason: str


class Turn(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """All that came out of one turn of an instance. It arrives as a whole or not at all."""

    instance_id: InstanceId
    effects: tuple[OutgoingEffect, ...] = ()
    logprobs: dict[StepId, dict[RequestId, tuple[TokenLogprobs, ...]]] = {}
    num_cached_tokens: dict[RequestId, int] = {}  # of prompts whose first tokens were planned, where not 0
    status: InstanceStatus | None = None
    log_lines: bytes = b""


class InstanceDied(msgspec.Struct, frozen=True, tag=True):
    """The last that it says: its device cannot go on."""

    instance_id: InstanceId
    reason: str


FromInstance = Started | StartFailed | Turn | InstanceDied

# --- instance to instance --------------------------------------------------------------------------


class TransferData(msgspec.Struct, frozen=True, tag=True):
    """The KV of some blocks of the receiver: one of the parts of a transfer, which are sent in order.

    Transfer ids begin anew with each incarnation of their source, so none of these messages goes without it.
    """

    transfer_id: TransferId
    request_id: RequestId
    source_instance_id: InstanceId
    source_incarnation: int
    target_block_ids: tuple[BlockId, ...]
    data: bytes
    part: int = 0
    num_parts: int = 1


class TransferCancelled(msgspec.Struct, frozen=True, tag=True):
    """The sender no longer wants this transfer, and asks what became of it. Sent again until answered."""

    transfer_id: TransferId
    source_instance_id: InstanceId
    source_incarnation: int


class TransferAnswer(msgspec.Struct, frozen=True, tag=True):
    """How a transfer ended on the receiver's side, where nothing is written for it any more."""

    transfer_id: TransferId
    source_incarnation: int
    failure: str | None = None


PeerMessage = TransferData | TransferCancelled | TransferAnswer
