"""RadixIndex against a plain dict from prefixes to blocks, block by block."""

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from sagellm.core.identity import BlockId
from sagellm.kv_policy.eviction import make_eviction_policy
from sagellm.prefix_reuse.eviction_queue import EvictionQueue
from sagellm.prefix_reuse.radix_index import RadixIndex
from sagellm.prefix_reuse.radix_node import RadixNode

Prefix = tuple[Hashable, ...]
KEYS = st.lists(st.integers(0, 2), max_size=7).map(tuple)


@dataclass
class NaiveBlock:
    block_id: BlockId
    last_use: int = 0
    num_locks: int = 0


@dataclass
class Lock:
    node: RadixNode
    prefix: Prefix


class RadixIndexMachine(RuleBasedStateMachine):
    """The model has one entry per cached block, under the whole path of keys that leads to it."""

    locks = Bundle("locks")

    def __init__(self) -> None:
        super().__init__()
        self.index = RadixIndex(make_eviction_policy("lru"))
        self.cached: dict[Prefix, NaiveBlock] = {}
        self.fresh_ids = map(BlockId, count())
        self.time = count(1)

    def known(self, keys: Prefix) -> list[Prefix]:
        """The prefixes of ``keys`` that are cached without a gap."""
        found = []
        for end in range(1, len(keys) + 1):
            if keys[:end] not in self.cached:
                break
            found.append(keys[:end])
        return found

    def touch(self, prefixes: list[Prefix], num_locks: int = 0) -> None:
        now = next(self.time)
        for prefix in prefixes:
            self.cached[prefix].last_use = now
            self.cached[prefix].num_locks += num_locks

    def cache_naively(self, keys: Prefix, block_ids: list[BlockId]) -> int:
        num_known = len(self.known(keys))
        for end in range(num_known + 1, len(keys) + 1):
            self.cached[keys[:end]] = NaiveBlock(block_ids[end - 1])
        return num_known

    @rule(keys=KEYS, limit=st.none() | st.integers(0, 7))
    def match(self, keys: Prefix, limit: int | None) -> None:
        found = self.known(keys)[:limit]
        match = self.index.match(keys, limit)
        assert match.num_blocks == len(found)
        assert self.index.block_ids(match) == [self.cached[prefix].block_id for prefix in found]
        assert self.index.num_lockable(match) == sum(self.cached[prefix].num_locks == 0 for prefix in found)

    @rule(keys=KEYS)
    def insert(self, keys: Prefix) -> None:
        block_ids = [next(self.fresh_ids) for _ in keys]
        assert self.index.insert(keys, block_ids) == self.cache_naively(keys, block_ids)
        self.touch(self.known(keys))

    @rule(target=locks, keys=KEYS, limit=st.integers(0, 7))
    def lock(self, keys: Prefix, limit: int) -> Lock:
        match = self.index.match(keys, limit)
        node = self.index.lock(match)
        self.touch(self.known(keys)[:limit], num_locks=1)
        return Lock(node, keys[: match.num_blocks])

    @rule(target=locks, lock=consumes(locks), more=KEYS)
    def extend_lock(self, lock: Lock, more: Prefix) -> Lock:
        keys = lock.prefix + more
        block_ids = [next(self.fresh_ids) for _ in keys]
        node, num_known = self.index.extend_lock(lock.node, keys, block_ids)
        assert num_known == self.cache_naively(keys, block_ids)
        self.touch(self.known(keys)[len(lock.prefix) :], num_locks=1)
        return Lock(node, keys)

    @rule(lock=consumes(locks))
    def unlock(self, lock: Lock) -> None:
        self.index.unlock(lock.node)
        self.touch(self.known(lock.prefix), num_locks=-1)

    @rule(share=st.floats(0, 1))
    def evict(self, share: float) -> None:
        """Exactly the least recently used of the blocks that have nothing after them, one by one."""
        number = int(share * self.index.num_evictable)
        expected = []
        for _ in range(number):
            inner = {prefix[:-1] for prefix in self.cached}
            leaves = [p for p, block in self.cached.items() if p not in inner and block.num_locks == 0]
            victim = min(leaves, key=lambda prefix: self.cached[prefix].last_use)
            expected.append(self.cached.pop(victim).block_id)
        assert self.index.evict(number) == expected

    @invariant()
    def counters_are_right(self) -> None:
        self.index.check()
        assert self.index.num_cached == len(self.cached)
        assert self.index.num_evictable == sum(block.num_locks == 0 for block in self.cached.values())


RadixIndexMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRadixIndexMachine = RadixIndexMachine.TestCase


def test_no_more_is_evicted_than_is_free_to_go() -> None:
    index = RadixIndex(make_eviction_policy("lru"))
    index.insert((1, 2, 3), [BlockId(0), BlockId(1), BlockId(2)])
    node = index.lock(index.match((1, 2, 3), 2))
    with pytest.raises(AssertionError, match="1 are evictable"):
        index.evict(2)
    assert index.evict(1) == [2]
    index.unlock(node)
    assert index.evict(2) == [1, 0]
    with pytest.raises(AssertionError, match="I2"):
        index.unlock(node)


def test_a_queue_does_not_grow_with_uses() -> None:
    """Entries that went out of date are swept up, or a long run would fill the memory."""
    queue = EvictionQueue(make_eviction_policy("lru"))
    nodes = [RadixNode(None, [serial], [BlockId(serial)], 1, serial) for serial in range(10)]
    for use in range(20_000):
        nodes[use % 10].last_use = use
        queue.offer(nodes[use % 10])
    assert len(queue) <= 1024
    assert queue.first() is nodes[0]
