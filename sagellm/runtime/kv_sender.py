"""The prefill side of a KV hand-over: what has been reserved, sent, and is under way.

A decode instance reserves blocks first; full blocks then move as soon as the steps that wrote them
have come back, one transfer at a time for each request, and the rest when the prompt is done. Where
the decode instance is chosen only at the end, the same code makes one transfer of all blocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, RequestId, TransferId
from sagellm.core.messages import (
    CancelTransfer,
    HandoverFailed,
    HandoverFinished,
    InstanceEffect,
    KVReserved,
    ReleaseKV,
    RequestMoved,
    TransferKV,
)
from sagellm.kv_runtime.kv_cache import RequestBlocks
from sagellm.runtime.local_request import LocalRequest, RequestState


@dataclass(slots=True)
class _HeldBlocks:
    """Blocks that their request has given up while transfers read them."""

    blocks: RequestBlocks
    num_readers: int


@dataclass(slots=True)
class _Handover:
    request: LocalRequest
    reservation: KVReserved
    num_blocks_sent: int  # logical blocks of the request that are on the target
    num_failures: int = 0
    transfer_id: TransferId | None = None
    num_blocks_after: int = 0  # num_blocks_sent once the current transfer is through
    off: bool = False  # given up; the target is released when nothing is under way any more
    held: _HeldBlocks | None = None  # what the current transfer reads, where the request has given it up


class KVSender:
    """Hand-overs of one prefill instance."""

    def __init__(self, config: InstanceConfig) -> None:
        self._config = config
        self._handovers: dict[RequestId, _Handover] = {}
        self._by_transfer: dict[TransferId, _Handover] = {}
        self._deadlines_ns: dict[TransferId, int] = {}  # in order of time: the time-out is one constant
        self._next_transfer = 0
        self.released: list[RequestBlocks] = []  # blocks that no transfer reads any more, for the instance to free

    def deadline_ns(self) -> int | None:
        return next(iter(self._deadlines_ns.values()), None)

    @property
    def is_idle(self) -> bool:
        """True where there is nothing to send, to wait for, or to cancel."""
        return not self._handovers and not self._by_transfer

    @property
    def is_busy(self) -> bool:
        """True while any transfer is under way."""
        return bool(self._by_transfer)

    def in_a_circle(self, waiting: Iterable[LocalRequest], requests: Iterable[LocalRequest]) -> list[LocalRequest]:
        """Prefilled requests that have no room elsewhere, where one that waits here to be prefilled has it already.

        If nothing runs, that is a circle: what holds the blocks here may wait for room that is kept for just
        those that wait for blocks here. Where the former decode here, their blocks come free in the end.
        """
        if not any(request.request_id in self._handovers for request in waiting):
            return []
        return [each for each in requests if each.waits_for_hand_over and each.request_id not in self._handovers]

    def hold(self, request: LocalRequest, blocks: RequestBlocks) -> bool:
        """Keep blocks that the request gives up until no transfer reads them; False where none does."""
        readers = [
            handover for handover in self._by_transfer.values() if handover.request is request and handover.held is None
        ]
        held = _HeldBlocks(blocks, len(readers))
        for handover in readers:
            handover.held = held
        return bool(readers)

    def reserve(self, request: LocalRequest | None, reservation: KVReserved) -> list[InstanceEffect]:
        """A decode instance is ready for the request, which may be gone or stay by now.

        A newer reservation replaces an older one.
        """
        if request is None or not request.hand_over:
            return [release_of(reservation)]
        old = self._handovers.get(request.request_id)
        if old is not None and old.reservation.attempt >= reservation.attempt:
            return [release_of(reservation)]
        effects: list[InstanceEffect] = self.stop(request.request_id) if old is not None else []
        self._handovers[request.request_id] = _Handover(request, reservation, reservation.first_block_index)
        return effects

    def stop(self, request_id: RequestId) -> list[InstanceEffect]:
        """Give a hand-over up. Its target is released once no transfer writes there any more."""
        handover = self._handovers.pop(request_id, None)
        if handover is None:
            return []
        handover.off = True
        if handover.transfer_id is not None:
            self._deadlines_ns.pop(handover.transfer_id, None)
            return [CancelTransfer(handover.transfer_id)]
        return [release_of(handover.reservation)]

    def closed(self, transfer_id: TransferId, failure: str | None) -> list[InstanceEffect]:
        """A transfer ended, well where ``failure`` is None. Ends of unknown transfers are stale."""
        handover = self._by_transfer.pop(transfer_id, None)
        self._deadlines_ns.pop(transfer_id, None)
        if handover is None:
            return []
        handover.transfer_id = None
        handover.request.num_transfers -= 1
        if handover.held is not None:
            handover.held.num_readers -= 1
            if handover.held.num_readers == 0:
                self.released.append(handover.held.blocks)
            handover.held = None
        if handover.off:
            return [release_of(handover.reservation)]
        if failure is None:
            handover.num_blocks_sent = handover.num_blocks_after
            return []
        handover.num_failures += 1
        if handover.num_failures < self._config.transfer_attempts_max:
            return []
        del self._handovers[handover.request.request_id]
        reservation = handover.reservation
        return [
            release_of(reservation),
            HandoverFailed(
                request_id=handover.request.request_id,
                instance_id=self._config.instance_id,
                target_instance_id=reservation.target_instance_id,
                attempt=reservation.attempt,
                reason=failure,
            ),
        ]

    def expire(self, now_ns: int) -> list[InstanceEffect]:
        """Cancel transfers that took too long; what then closes them counts as their result."""
        late = [transfer_id for transfer_id, at_ns in self._deadlines_ns.items() if at_ns <= now_ns]
        for transfer_id in late:
            del self._deadlines_ns[transfer_id]
        return [CancelTransfer(transfer_id) for transfer_id in late]

    def advance(self, now_ns: int) -> tuple[list[InstanceEffect], list[LocalRequest]]:
        """Start what can be sent; also give the requests whose KV is now all on their target."""
        effects: list[InstanceEffect] = []
        moved: list[LocalRequest] = []
        for handover in list(self._handovers.values()):
            if handover.transfer_id is not None:
                continue
            num_ready = self._num_blocks_ready(handover.request)
            if handover.num_blocks_sent < num_ready:
                effects.append(self._start(handover, num_ready, now_ns))
            elif handover.request.state is RequestState.HANDING_OVER:
                effects.extend(self._finish(handover))
                moved.append(handover.request)
        return effects, moved

    def _num_blocks_ready(self, request: LocalRequest) -> int:
        block_size = self._config.block_size
        if request.state is RequestState.HANDING_OVER:
            return -(-request.prefill_target // block_size)
        return request.num_returned_tokens // block_size

    def _start(self, handover: _Handover, num_ready: int, now_ns: int) -> TransferKV:
        reservation, request = handover.reservation, handover.request
        assert request.blocks is not None
        first = handover.num_blocks_sent
        offset = first - reservation.first_block_index
        source: tuple[BlockId, ...] = tuple(request.blocks.block_ids[first:num_ready])
        self._next_transfer += 1
        transfer_id = TransferId(f"{self._config.instance_id}/{self._next_transfer}")
        handover.transfer_id = transfer_id
        request.num_transfers += 1
        handover.num_blocks_after = num_ready
        self._by_transfer[transfer_id] = handover
        self._deadlines_ns[transfer_id] = now_ns + self._config.transfer_timeout_ns
        return TransferKV(
            transfer_id=transfer_id,
            request_id=request.request_id,
            source_instance_id=self._config.instance_id,
            target_instance_id=reservation.target_instance_id,
            source_block_ids=source,
            target_block_ids=reservation.block_ids[offset : offset + len(source)],
            num_bytes=len(source) * self._config.block_size * self._config.kv_bytes_per_token,
        )

    def _finish(self, handover: _Handover) -> list[InstanceEffect]:
        request, reservation = handover.request, handover.reservation
        del self._handovers[request.request_id]
        token_ids = None if request.output_token_ids is None else tuple(request.output_token_ids)
        return [
            HandoverFinished(
                instance_id=reservation.target_instance_id,
                request_id=request.request_id,
                attempt=reservation.attempt,
                num_computed_tokens=request.prefill_target,
                num_output_tokens=request.num_output_tokens,
                output_token_ids=token_ids,
            ),
            RequestMoved(
                request_id=request.request_id,
                instance_id=self._config.instance_id,
                target_instance_id=reservation.target_instance_id,
                attempt=reservation.attempt,
                num_output_tokens=request.num_output_tokens,
                output_token_ids=token_ids,
            ),
        ]


def release_of(reservation: KVReserved) -> ReleaseKV:
    """The message that gives a reservation's room back."""
    return ReleaseKV(reservation.target_instance_id, reservation.request_id, reservation.attempt)
