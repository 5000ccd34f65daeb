"""KV between instances: only what is reserved is written, and every transfer is closed by what is true."""

from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import given

import sagellm.server.live.kv_transfers as kv_transfers
from backends.executor_settings import ExecutorSettings
from backends.null.executor import NullExecutor
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, InstanceId, RequestId, TransferId
from sagellm.core.messages import KVReserved, KVTransferFailed, KVTransferred, TransferKV
from sagellm.server.live.kv_transfers import ASK_AGAIN_NS, KVTransfers, TransferEnd
from sagellm.server.live.wire import PeerMessage, TransferAnswer, TransferCancelled, TransferData

SOURCE, TARGET = InstanceId("source"), InstanceId("target")
REQUEST = RequestId("r")


class RememberingExecutor(NullExecutor):
    """Knows which blocks were written."""

    def __init__(self) -> None:
        super().__init__(ExecutorSettings(InstanceConfig(TARGET, 8), "m", "none"))
        self.written: list[tuple[BlockId, ...]] = []

    def write_blocks(self, block_ids: tuple[BlockId, ...], data: bytes) -> None:
        super().write_blocks(block_ids, data)
        self.written.append(block_ids)


class Pair:
    """Two instances' ends, and the messages between them, delivered when a test says so."""

    def __init__(self) -> None:
        self.on_the_way: deque[tuple[InstanceId, PeerMessage]] = deque()
        self.executor = RememberingExecutor()
        self.source = KVTransfers(SOURCE, self.executor, lambda to, message: self.on_the_way.append((to, message)))
        self.target = KVTransfers(TARGET, self.executor, lambda to, message: self.on_the_way.append((to, message)))

    def deliver(self) -> list[TransferEnd]:
        """All that is on the way, and what it brings about; the ends that the source hears of."""
        ends: list[TransferEnd] = []
        while self.on_the_way:
            to, message = self.on_the_way.popleft()
            end = (self.source if to == SOURCE else self.target).receive(message)
            if end is not None:
                assert to == SOURCE
                ends.append(end)
        return ends


def transfer(number: int, *block_ids: int) -> TransferKV:
    blocks = tuple(BlockId(each) for each in block_ids)
    return TransferKV(TransferId(f"t{number}"), REQUEST, SOURCE, TARGET, blocks, blocks, len(blocks))


def reserved(*block_ids: int, source: InstanceId = SOURCE) -> KVReserved:
    return KVReserved(source, REQUEST, TARGET, 1, 0, tuple(BlockId(each) for each in block_ids))


def test_reserved_blocks_are_written_and_the_source_hears_of_it() -> None:
    pair = Pair()
    pair.target.open(reserved(3, 4, 5))
    assert pair.source.start(transfer(1, 4, 5)) is None
    assert pair.deliver() == [KVTransferred(TransferId("t1"))]
    assert pair.executor.written == [(4, 5)]


@given(
    open_blocks=st.sets(st.integers(0, 7)),
    sent_blocks=st.sets(st.integers(0, 7), min_size=1),
    other_source=st.booleans(),
    is_shut=st.booleans(),
)
def test_nothing_is_written_that_is_not_reserved(
    open_blocks: set[int], sent_blocks: set[int], other_source: bool, is_shut: bool
) -> None:
    pair = Pair()
    pair.target.open(reserved(*open_blocks, source=InstanceId("other") if other_source else SOURCE))
    pair.source.start(transfer(1, *sent_blocks))
    if is_shut:
        pair.target.shut(REQUEST)
    (end,) = pair.deliver()
    may_write = sent_blocks <= open_blocks and not other_source and not is_shut
    assert isinstance(end, KVTransferred) == may_write
    assert bool(pair.executor.written) == may_write


@given(order=st.lists(st.integers(0, 3), max_size=10))
def test_a_transfer_in_parts_has_succeeded_when_all_are_written_in_order(order: list[int]) -> None:
    """Whatever is lost, comes twice or too late: an answer that all is well means that all is written."""
    pair = Pair()
    pair.target.open(reserved(1, 2, 3, 4))
    parts = [
        TransferData(TransferId("t1"), REQUEST, SOURCE, 0, (BlockId(part + 1),), b"x", part, 4) for part in range(4)
    ]
    for part in order:
        pair.target.receive(parts[part])
    answers = [message for _, message in pair.on_the_way if isinstance(message, TransferAnswer)]
    is_whole = pair.executor.written == [(1,), (2,), (3,), (4,)]
    assert [answer.failure for answer in answers[:1]] == ([None] if is_whole else ["a part of it is missing"])[
        : len(answers)
    ]
    assert len({answer.failure for answer in answers}) <= 1
    assert bool(pair.target._incoming) == (bool(order) and not answers)


def test_much_kv_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No message holds more than one may be long."""
    monkeypatch.setattr(kv_transfers, "PART_BYTES_MAX", 2)
    pair = Pair()
    pair.target.open(reserved(1, 2, 3, 4, 5))
    assert pair.source.start(transfer(1, 1, 2, 3, 4, 5)) is None
    assert pair.deliver() == [KVTransferred(TransferId("t1"))]
    assert pair.executor.written == [(1, 2), (3, 4), (5,)]


def test_data_that_comes_twice_is_written_once_and_answered_alike() -> None:
    pair = Pair()
    pair.target.open(reserved(1))
    pair.source.start(transfer(1, 1))
    pair.on_the_way.append(pair.on_the_way[0])
    assert pair.deliver() == [KVTransferred(TransferId("t1"))]
    assert len(pair.executor.written) == 1


def test_a_cancelled_transfer_that_was_written_has_succeeded() -> None:
    pair = Pair()
    pair.target.open(reserved(1))
    pair.source.start(transfer(1, 1))
    pair.source.cancel(TransferId("t1"), 0)
    assert pair.deliver() == [KVTransferred(TransferId("t1"))]


def test_data_behind_its_own_cancellation_is_not_written() -> None:
    pair = Pair()
    pair.target.open(reserved(1))
    pair.source.start(transfer(1, 1))
    pair.source.cancel(TransferId("t1"), 0)
    pair.on_the_way.reverse()
    assert pair.deliver() == [KVTransferFailed(TransferId("t1"), "cancelled")]
    assert not pair.executor.written


def test_a_lost_answer_is_asked_for_until_it_comes() -> None:
    """F10."""
    pair = Pair()
    pair.target.open(reserved(1))
    pair.source.start(transfer(1, 1))
    _, data = pair.on_the_way.popleft()
    assert isinstance(data, TransferData)
    pair.target.receive(data)
    pair.on_the_way.clear()  # the answer is lost
    pair.source.cancel(TransferId("t1"), 10)
    _, question = pair.on_the_way.popleft()  # and so is the first question
    assert isinstance(question, TransferCancelled)
    assert pair.source.ask_ns == 10 + ASK_AGAIN_NS
    pair.source.ask(10 + ASK_AGAIN_NS - 1)
    assert not pair.on_the_way
    pair.source.ask(10 + ASK_AGAIN_NS)
    assert pair.deliver() == [KVTransferred(TransferId("t1"))]
    assert pair.source.ask_ns is None


def test_a_lost_peer_closes_what_goes_there_and_writes_nothing_more() -> None:
    pair = Pair()
    pair.target.open(reserved(1))
    pair.source.start(transfer(1, 1))
    assert pair.source.lose_peer(TARGET) == [KVTransferFailed(TransferId("t1"), "target is lost")]
    assert pair.source.start(transfer(2, 1)) == KVTransferFailed(TransferId("t2"), "target is lost")
    pair.target.lose_peer(SOURCE)
    assert pair.deliver() == []
    assert not pair.executor.written


def test_what_a_lost_instance_had_sent_is_not_taken_for_its_successor_s() -> None:
    """Both number their transfers from 1."""
    pair = Pair()
    pair.target.open(reserved(1))
    pair.source.start(transfer(1, 1))
    _, of_the_lost = pair.on_the_way.popleft()
    pair.target.lose_peer(SOURCE)
    pair.target.welcome_peer(SOURCE, 1)
    pair.target.open(reserved(1))
    pair.target.receive(of_the_lost)
    assert not pair.executor.written
    pair.source = KVTransfers(
        SOURCE, pair.executor, lambda to, message: pair.on_the_way.append((to, message)), incarnation=1
    )
    pair.source.start(transfer(1, 1))
    assert pair.source.receive(TransferAnswer(TransferId("t1"), 0)) is None
    assert pair.deliver() == [KVTransferred(TransferId("t1"))]
    assert len(pair.executor.written) == 1


def test_an_answer_to_a_lost_instance_is_not_its_successor_s() -> None:
    pair = Pair()
    pair.target.open(reserved(1))
    pair.source.start(transfer(1, 1))
    assert pair.deliver() == [KVTransferred(TransferId("t1"))]
    pair.target.lose_peer(SOURCE)
    pair.target.welcome_peer(SOURCE, 1)
    pair.source = KVTransfers(
        SOURCE, pair.executor, lambda to, message: pair.on_the_way.append((to, message)), incarnation=1
    )
    pair.source.start(transfer(1, 1))
    assert pair.deliver() == [KVTransferFailed(TransferId("t1"), "the blocks are not reserved for it any more")]


def test_data_of_another_size_is_a_failure_that_says_so() -> None:
    pair = Pair()
    pair.target.open(reserved(1, 2))
    pair.target.receive(TransferData(TransferId("t1"), REQUEST, SOURCE, 0, (BlockId(1), BlockId(2)), b"x"))
    _, answer = pair.on_the_way.popleft()
    assert isinstance(answer, TransferAnswer)
    assert "1 bytes, must be 2" in str(answer.failure)
