"""KV on its way from instance to instance: both ends of it, as one instance sees them.

Data names the blocks that it is for. It is written only while these blocks are reserved for that
request and that sender: whatever comes late, twice, or from somebody who is lost is dropped, and
answered as failed. The answer closes the transfer at its source. A cancelled transfer is closed by the
answer, too, for only the receiver knows whether the data was written; the question is repeated until
it is answered, so that no lost answer leaves blocks behind.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from sagellm.core.identity import InstanceId, RequestId, TransferId
from sagellm.core.messages import (
    KVReserved,
    KVTransferFailed,
    KVTransferred,
    TransferKV,
)
from sagellm.core.step_executor import StepExecutor
from sagellm.server.live.wire import PeerMessage, TransferAnswer, TransferCancelled, TransferData

ASK_AGAIN_NS = 1_000_000_000
PART_BYTES_MAX = 256 << 20
"""One message holds no more: the KV of a long prompt is more than a message can be long (4 GiB)."""
_ANSWERS_KEPT = 4096

TransferEnd = KVTransferred | KVTransferFailed
SendToPeer = Callable[[InstanceId, PeerMessage], None]


@dataclass(slots=True)
class _Outgoing:
    target_id: InstanceId
    ask_ns: int | None = None  # when to ask next what became of it; None: it was not cancelled


@dataclass(slots=True)
class _Incoming:
    """A transfer of which some parts are written, and some are not."""

    source_id: InstanceId
    num_parts_written: int = 0


class KVTransfers:
    """Transfers from and to one instance."""

    def __init__(self, instance_id: InstanceId, executor: StepExecutor, send: SendToPeer, incarnation: int = 0) -> None:
        self._instance_id = instance_id
        self._incarnation = incarnation
        self._executor = executor
        self._send = send
        self._outgoing: dict[TransferId, _Outgoing] = {}
        self._reserved: dict[RequestId, KVReserved] = {}
        self._answers: OrderedDict[tuple[int, TransferId], TransferAnswer] = OrderedDict()
        self._incoming: dict[tuple[int, TransferId], _Incoming] = {}
        self._lost: dict[InstanceId, None] = {}
        self._incarnations: dict[InstanceId, int] = {}  # of peers that run again

    # --- the receiving end -------------------------------------------------------------------------

    def open(self, answer: KVReserved) -> None:
        """This instance has room for a request's KV, and said so to the sender."""
        self._reserved[answer.request_id] = answer

    def shut(self, request_id: RequestId) -> None:
        """Nothing may be written for the request any more."""
        self._reserved.pop(request_id, None)

    # --- the sending end ---------------------------------------------------------------------------

    def start(self, transfer: TransferKV) -> KVTransferFailed | None:
        """Send the blocks; the failure, where nobody is there to take them or the device does not give them."""
        target_id = transfer.target_instance_id
        if target_id in self._lost:
            return KVTransferFailed(transfer.transfer_id, f"{target_id} is lost")
        block_bytes = max(1, transfer.num_bytes // len(transfer.source_block_ids))
        num_blocks_max = max(1, PART_BYTES_MAX // block_bytes)
        firsts = range(0, len(transfer.source_block_ids), num_blocks_max)
        for part, first in enumerate(firsts):
            blocks = slice(first, first + num_blocks_max)
            try:
                data = self._executor.read_blocks(transfer.source_block_ids[blocks])
            except (ValueError, RuntimeError) as error:
                # What was sent of it is to be forgotten there.
                self._send(target_id, TransferCancelled(transfer.transfer_id, self._instance_id, self._incarnation))
                return KVTransferFailed(transfer.transfer_id, f"{self._instance_id} cannot read the KV: {error}")
            message = TransferData(
                transfer.transfer_id,
                transfer.request_id,
                self._instance_id,
                self._incarnation,
                transfer.target_block_ids[blocks],
                data,
                part,
                len(firsts),
            )
            self._send(target_id, message)
        self._outgoing[transfer.transfer_id] = _Outgoing(target_id)
        return None

    def cancel(self, transfer_id: TransferId, now_ns: int) -> None:
        """Have the transfer closed soon, by whichever end is true."""
        outgoing = self._outgoing.get(transfer_id)
        if outgoing is not None:
            outgoing.ask_ns = now_ns
            self.ask(now_ns)

    def ask(self, now_ns: int) -> None:
        """Ask the receivers of cancelled transfers, where it is time to."""
        for transfer_id, outgoing in self._outgoing.items():
            if outgoing.ask_ns is not None and outgoing.ask_ns <= now_ns:
                outgoing.ask_ns = now_ns + ASK_AGAIN_NS
                question = TransferCancelled(transfer_id, self._instance_id, self._incarnation)
                self._send(outgoing.target_id, question)

    @property
    def ask_ns(self) -> int | None:
        """When `ask` has something to do."""
        return min((each.ask_ns for each in self._outgoing.values() if each.ask_ns is not None), default=None)

    # --- both --------------------------------------------------------------------------------------

    def receive(self, message: PeerMessage) -> TransferEnd | None:
        """A peer's message; the end of one of our own transfers, if it is that."""
        match message:
            case TransferData():
                if self._is_there(message):
                    self._take(message)
                return None
            case TransferCancelled(transfer_id=transfer_id, source_incarnation=incarnation):
                if self._is_there(message):
                    answer = TransferAnswer(transfer_id, incarnation, "cancelled")
                    self._answer(message.source_instance_id, self._answers.get((incarnation, transfer_id), answer))
                return None
            case TransferAnswer(transfer_id=transfer_id, failure=failure):
                if message.source_incarnation != self._incarnation or self._outgoing.pop(transfer_id, None) is None:
                    return None
                return KVTransferred(transfer_id) if failure is None else KVTransferFailed(transfer_id, failure)
            case _:
                assert_never(message)

    def _is_there(self, message: TransferData | TransferCancelled) -> bool:
        """Whether it was said by an instance that lives, and not by one that was lost under this name."""
        source_id = message.source_instance_id
        return source_id not in self._lost and message.source_incarnation == self._incarnations.get(source_id, 0)

    def welcome_peer(self, peer_id: InstanceId, incarnation: int) -> None:
        """A lost instance runs again."""
        self._lost.pop(peer_id, None)
        self._incarnations[peer_id] = incarnation

    def lose_peer(self, peer_id: InstanceId) -> list[KVTransferFailed]:
        """That instance is gone; the ends of what was on its way there."""
        self._lost[peer_id] = None
        late = [transfer_id for transfer_id, each in self._outgoing.items() if each.target_id == peer_id]
        for transfer_id in late:
            del self._outgoing[transfer_id]
        for request_id in [each.request_id for each in self._reserved.values() if each.instance_id == peer_id]:
            del self._reserved[request_id]
        for key in [key for key, each in self._incoming.items() if each.source_id == peer_id]:
            del self._incoming[key]
        return [KVTransferFailed(transfer_id, f"{peer_id} is lost") for transfer_id in late]

    def _take(self, message: TransferData) -> None:
        """Write a part; answer where it was the last, where it cannot be written, and where one is missing."""
        key = (message.source_incarnation, message.transfer_id)
        source_id = message.source_instance_id
        earlier = self._answers.get(key)
        if earlier is not None:
            self._answer(source_id, earlier)
            return
        incoming = self._incoming.setdefault(key, _Incoming(source_id))
        if message.part < incoming.num_parts_written:
            return  # it came twice
        if message.part > incoming.num_parts_written:
            answer = TransferAnswer(message.transfer_id, message.source_incarnation, "a part of it is missing")
        else:
            answer = self._write(message)
            incoming.num_parts_written += 1
        if answer.failure is not None or incoming.num_parts_written == message.num_parts:
            self._answer(source_id, answer)

    def _write(self, message: TransferData) -> TransferAnswer:
        transfer_id, incarnation = message.transfer_id, message.source_incarnation
        reserved = self._reserved.get(message.request_id)
        is_open = (
            reserved is not None
            and reserved.instance_id == message.source_instance_id
            and set(message.target_block_ids).issubset(reserved.block_ids)
        )
        if not is_open:
            return TransferAnswer(transfer_id, incarnation, "the blocks are not reserved for it any more")
        try:
            self._executor.write_blocks(message.target_block_ids, message.data)
        except ValueError as error:
            return TransferAnswer(transfer_id, incarnation, f"{self._instance_id} cannot take the KV: {error}")
        return TransferAnswer(transfer_id, incarnation)

    def _answer(self, source_id: InstanceId, answer: TransferAnswer) -> None:
        key = (answer.source_incarnation, answer.transfer_id)
        self._incoming.pop(key, None)
        self._answers[key] = answer
        if len(self._answers) > _ANSWERS_KEPT:
            self._answers.popitem(last=False)
        self._send(source_id, answer)
