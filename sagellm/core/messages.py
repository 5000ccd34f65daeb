"""Everything that a machine can be told, and everything that it can ask for.

Events are past tense: something happened. Effects are imperative: a driver must make it so. What one
machine says to another is a message: an effect of the sender and an event of the receiver, the same
object whether it crosses a function call, a process or a simulated network. A driver delivers a
message *after* the instant in which it was sent.

An effect that takes time carries an id, and exactly one later event closes it: ``RunStep`` is closed
by ``StepFinished`` or ``StepFailed``; ``TransferKV`` by ``KVTransferred`` or ``KVTransferFailed``,
which its source receives.

What a driver owes the machines: messages between two machines arrive in order and later than they
were sent; ``InstanceLost`` comes after all messages that the instance had sent, and when no transfer
from or to it writes any more (transfers to it fail).

Those that every request causes are final: comparing types tells them apart several times as fast as
``isinstance``, which asks a struct's metaclass wherever the answer is no.
"""

from typing import final

import msgspec

from sagellm.core.config import Role
from sagellm.core.ends import Ends
from sagellm.core.identity import BlockId, InstanceId, RequestId, StepId, TransferId
from sagellm.core.plan import StepPlan
from sagellm.core.request import FinishReason, RequestSpec


class _Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, gc=False):
    """What is told names others by their ids, so there are no cycles that a garbage collector could find."""


# --- from the world to the control plane -----------------------------------------------------------


@final
class RequestArrived(_Message, frozen=True):
    request: RequestSpec


class RequestCancelled(_Message, frozen=True):
    """The client went away, or has all that it wanted (``reason`` stop: a stop string was found in the text)."""

    request_id: RequestId
    reason: FinishReason = FinishReason.ABORT


class InstanceJoined(_Message, frozen=True):
    """An instance is ready to serve."""

    instance_id: InstanceId
    role: Role
    num_token_slots: int  # KV tokens that it can hold
    max_num_seqs: int
    max_num_batched_tokens: int


class EmittedOutput(msgspec.Struct, frozen=True, gc=False):
    """What a client had received of one request when its instance was lost."""

    request_id: RequestId
    num_output_tokens: int
    output_token_ids: tuple[int, ...] | None = None


class InstanceLost(_Message, frozen=True):
    """An instance died.

    ``emitted`` has the output that clients already have of each unfinished request that the instance
    was ever told of, wherever that output came from.
    """

    instance_id: InstanceId
    emitted: tuple[EmittedOutput, ...] = ()


# --- messages: control plane to instance -----------------------------------------------------------


@final
class AssignRequest(_Message, frozen=True):
    """Serve this request. With ``hand_over`` the instance prefills it and passes its KV on."""

    instance_id: InstanceId
    request: RequestSpec
    hand_over: bool = False
    num_output_tokens: int = 0  # emitted before, by an instance that was lost
    output_token_ids: tuple[int, ...] | None = None


class ReserveKV(_Message, frozen=True):
    """To a decode instance: make room for this request's KV, then say so to ``source_instance_id``.

    ``attempt`` numbers the hand-overs of one request; answers to an older attempt are stale.
    """

    instance_id: InstanceId
    request: RequestSpec
    source_instance_id: InstanceId
    attempt: int
    num_output_tokens: int = 0  # emitted before, by an instance that was lost: they are prefilled too


class AbortRequest(_Message, frozen=True):
    """Stop this request wherever it is. Answered by ``RequestFinished`` where it was still there."""

    instance_id: InstanceId
    request_id: RequestId
    reason: FinishReason = FinishReason.ABORT


class ReleaseKV(_Message, frozen=True):
    """To a decode instance: the hand-over of that attempt is off; give its room back."""

    instance_id: InstanceId
    request_id: RequestId
    attempt: int


class SourceLost(_Message, frozen=True):
    """To an instance: that prefill instance died; give back all room that waits for KV from it."""

    instance_id: InstanceId
    lost_instance_id: InstanceId


class DecodeHere(_Message, frozen=True):
    """To a prefill instance: no decode instance can take this request; go on with it yourself."""

    instance_id: InstanceId
    request_id: RequestId


# --- messages: instance to instance -----------------------------------------------------------------


class KVReserved(_Message, frozen=True):
    """From a decode instance to the prefill instance: these blocks wait for the request's KV.

    ``block_ids[i]`` takes the KV of the request's logical block ``first_block_index + i``; earlier
    blocks are in the decode instance's own prefix cache.
    """

    instance_id: InstanceId  # the receiver: the prefill instance
    request_id: RequestId
    target_instance_id: InstanceId
    attempt: int
    first_block_index: int
    block_ids: tuple[BlockId, ...]


class HandoverFinished(_Message, frozen=True):
    """From the prefill to the decode instance: all KV is there; the request is yours."""

    instance_id: InstanceId  # the receiver: the decode instance
    request_id: RequestId
    attempt: int
    num_computed_tokens: int
    num_output_tokens: int
    output_token_ids: tuple[int, ...] | None = None


# --- messages: instance to control plane ------------------------------------------------------------


@final
class PrefillFinished(_Message, frozen=True):
    """The request's prompt is computed and its first token is out."""

    request_id: RequestId
    instance_id: InstanceId


@final
class RequestFinished(_Message, frozen=True):
    """The request ended on this instance; nothing of it runs there any more.

    The control plane gives it itself where a lost instance had sent all output, but not this.
    """

    request_id: RequestId
    instance_id: InstanceId
    reason: FinishReason
    num_output_tokens: int


class RequestMoved(_Message, frozen=True):
    """The request's KV has left ``instance_id``; it decodes on ``target_instance_id`` from now on.

    ``attempt`` is that of the reservation: the target may have been lost, and be back and reserved once more.
    """

    request_id: RequestId
    instance_id: InstanceId
    target_instance_id: InstanceId
    attempt: int
    num_output_tokens: int  # sent to the client before it moved
    output_token_ids: tuple[int, ...] | None = None


class HandoverFailed(_Message, frozen=True):
    """The KV could not be moved. The prefill instance still holds it and waits to be told."""

    request_id: RequestId
    instance_id: InstanceId
    target_instance_id: InstanceId
    attempt: int
    reason: str


# --- from the device and the network to an instance -------------------------------------------------


@final
class StepProgressed(_Message, frozen=True):
    """Some repetitions of a repeated step are over, exactly one more is under way and is the last.

    ``ends_ns`` are the times at which the repetitions ended since the step was launched; it may be
    empty, where the step has only just begun to run.
    """

    instance_id: InstanceId
    step_id: StepId
    ends_ns: Ends
    token_ids: tuple[tuple[int, ...], ...] | None = None


@final
class StepFinished(_Message, frozen=True):
    """A step is over: ``len(ends_ns)`` repetitions, less those that ``StepProgressed`` told of.

    ``token_ids`` has one tuple for each of the plan's ``sampled_request_ids``, of one token for each
    repetition; None where tokens are symbolic (in simulation). ``invalid_request_ids`` are those whose
    logits were not finite: they end with an error, and what the step gave for them means nothing.
    """

    instance_id: InstanceId
    step_id: StepId
    ends_ns: Ends
    token_ids: tuple[tuple[int, ...], ...] | None = None
    invalid_request_ids: tuple[RequestId, ...] = ()


class StepFailed(_Message, frozen=True):
    """A step gave nothing: its requests' KV of this step must not be trusted."""

    instance_id: InstanceId
    step_id: StepId
    reason: str


class KVTransferred(_Message, frozen=True):
    transfer_id: TransferId


class KVTransferFailed(_Message, frozen=True):
    """The transfer is over and did not succeed. Nothing writes to its blocks any more."""

    transfer_id: TransferId
    reason: str


# --- effects ----------------------------------------------------------------------------------------


class RejectRequest(_Message, frozen=True):
    """Tell the client that its request is not served; its one terminal outcome."""

    request_id: RequestId
    reason: str
    retryable: bool  # true where the same request may succeed later


@final
class RunStep(_Message, frozen=True):
    """Run this plan, up to ``repeat_max`` times back to back, each request gaining a token each time.

    A driver ends the repetition at the first step boundary after an event for the instance. With two
    steps in flight one more repetition is by then under way; see ``StepProgressed``.

    With ``ends_quietly`` the step behind the last of all repetitions is settled now: where no event comes
    before the last but one is over, nothing is left to decide there. So a driver may leave that boundary
    out, and report all repetitions in one ``StepFinished``. The first step launched in answer belongs to
    the boundary that was left out: it counts as launched then, and is cut short by what came since.

    With ``plan_lead_ns`` the step behind each execution is planned late: so long before that execution is expected to
    end, but not before it begins, which is when it is launched and the one before it is over. It is expected to take
    as long as the one before it did; the first as long as the last execution of the step in flight before it, or
    ``expected_ns`` where there is none or it has chunks. An event that comes by then makes that execution the last, a
    later one the next. ``StepProgressed`` comes when the step behind the last one is to be planned, with ends that may
    be past, and that is also the boundary that a quiet end leaves out. A driver that cannot tell when it is may send
    ``StepProgressed`` without ends when the first execution begins; the instance then waits by itself.

    ``num_running``, ``num_waiting`` and ``num_blocks_in_use`` are for observers; no driver needs them.
    """

    instance_id: InstanceId
    step_id: StepId
    plan: StepPlan
    repeat_max: int = 1
    num_running: int = 0
    num_waiting: int = 0
    num_blocks_in_use: int = 0  # not counting cached blocks that nobody uses
    ends_quietly: bool = False
    plan_lead_ns: int = 0
    expected_ns: int = 0


@final
class EmitTokens(_Message, frozen=True):
    """Send tokens to clients: each of these requests got one token at each of these times."""

    instance_id: InstanceId
    step_id: StepId
    request_ids: tuple[RequestId, ...]
    ends_ns: Ends
    token_ids: tuple[tuple[int, ...], ...] | None = None


class TransferKV(_Message, frozen=True):
    """Copy whole blocks between instances. ``source_block_ids[i]`` goes to ``target_block_ids[i]``."""

    transfer_id: TransferId
    request_id: RequestId
    source_instance_id: InstanceId
    target_instance_id: InstanceId
    source_block_ids: tuple[BlockId, ...]
    target_block_ids: tuple[BlockId, ...]
    num_bytes: int


class CancelTransfer(_Message, frozen=True):
    """Stop a transfer. It is closed as ever, by whichever of its two events is true."""

    transfer_id: TransferId


MessageToInstance = (
    AssignRequest | ReserveKV | AbortRequest | ReleaseKV | SourceLost | DecodeHere | KVReserved | HandoverFinished
)
MessageToControlPlane = PrefillFinished | RequestFinished | RequestMoved | HandoverFailed
ControlPlaneEvent = RequestArrived | RequestCancelled | InstanceJoined | InstanceLost | MessageToControlPlane
ControlPlaneEffect = (
    AssignRequest | ReserveKV | AbortRequest | ReleaseKV | SourceLost | DecodeHere | RejectRequest | RequestFinished
)
InstanceEvent = MessageToInstance | StepProgressed | StepFinished | StepFailed | KVTransferred | KVTransferFailed
HandoverEffect = TransferKV | CancelTransfer | KVReserved | HandoverFinished | ReleaseKV | RequestMoved | HandoverFailed
"""What an instance asks for where KV moves, and nowhere else."""
InstanceEffect = RunStep | EmitTokens | PrefillFinished | RequestFinished | HandoverEffect
Event = ControlPlaneEvent | InstanceEvent
Effect = ControlPlaneEffect | InstanceEffect
