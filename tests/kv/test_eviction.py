"""Eviction policies: what each evicts, and how their hits compare with plain LRU and with the optimum."""

import random
from collections import OrderedDict
from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sagellm.core.identity import BlockId
from sagellm.kv_policy.eviction import EVICTION_POLICIES, make_eviction_policy
from sagellm.kv_runtime.hit_ratio import count_hit_blocks, count_optimal_hit_blocks
from sagellm.prefix_reuse.eviction_queue import EvictionQueue
from sagellm.prefix_reuse.radix_index import RadixIndex
from sagellm.prefix_reuse.radix_node import RadixNode

Prompts = list[tuple[int, ...]]


def as_block_keys(paths: list[list[int]]) -> Prompts:
    """Keys that differ wherever anything before them differs, as caches of single blocks need."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        tuple(numbers.setdefault(tuple(path[:end]), len(numbers)) for end in range(1, len(path) + 1)) for path in paths
    ]


PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=30).map(as_block_keys)


def count_flat_lru_hit_blocks(prompts: Prompts, num_blocks: int) -> int:
    """LRU over single blocks that knows nothing of prefixes; of one prompt, the first block is the newest."""
    recency: OrderedDict[int, None] = OrderedDict()  # the oldest first
    num_hits = 0
    for prompt in prompts:
        num_hits += sum(key in recency for key in prompt)
        for key in reversed(prompt[:num_blocks]):
            recency[key] = None
            recency.move_to_end(key)
        while len(recency) > num_blocks:
            recency.popitem(last=False)
    return num_hits


@given(prompts=PROMPTS, num_blocks=st.integers(6, 40))
def test_tree_lru_is_flat_lru(prompts: Prompts, num_blocks: int) -> None:
    """Exactly, with no tolerance: a block is never older than one after it, so that the oldest block
    of all always ends a leaf. (It takes a cache that holds the longest prompt.)"""
    assert count_hit_blocks(prompts, num_blocks) == count_flat_lru_hit_blocks(prompts, num_blocks)


def test_tree_lru_is_flat_lru_on_sessions() -> None:
    """The same on a long trace of growing conversations, whose hits depend on the size of the cache."""
    rng = random.Random(7)
    sessions: list[list[int]] = [[0] for _ in range(60)]
    paths = []
    for _ in range(1500):
        turn = min(int(rng.expovariate(0.08)), 59)
        path = sessions[turn] + [rng.randrange(1 << 30) for _ in range(rng.randint(1, 4))]
        paths.append(path)
        sessions[turn] = path if len(path) < 40 else [0]
    prompts = as_block_keys(paths)
    hits = [count_hit_blocks(prompts, num_blocks) for num_blocks in (50, 200, 800, 100_000)]
    assert hits == [count_flat_lru_hit_blocks(prompts, num_blocks) for num_blocks in (50, 200, 800, 100_000)]
    assert hits == sorted(set(hits))


@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
@given(prompts=PROMPTS, num_blocks=st.integers(1, 20))
def test_no_policy_beats_the_optimum(eviction: str, prompts: Prompts, num_blocks: int) -> None:
    num_hits = count_hit_blocks(prompts, num_blocks, eviction)
    assert num_hits <= count_optimal_hit_blocks(prompts, num_blocks)
    num_blocks_enough = 1 + sum(map(len, prompts))
    unbounded = count_hit_blocks(prompts, num_blocks_enough, eviction)
    assert unbounded == count_optimal_hit_blocks(prompts, num_blocks_enough)
    assert num_hits <= unbounded


@settings(max_examples=60, deadline=None)
@given(keys=st.lists(st.integers(0, 4), max_size=9), num_blocks=st.integers(1, 3))
def test_the_optimum_is_the_best_of_all_choices(keys: list[int], num_blocks: int) -> None:
    @cache
    def best(position: int, cached: frozenset[int]) -> int:
        if position == len(keys):
            return 0
        key = keys[position]
        after = cached | {key}
        choices = [cached, after] if len(after) <= num_blocks else [after - {victim} for victim in after]
        return (key in cached) + max(best(position + 1, choice) for choice in choices)

    assert count_optimal_hit_blocks([(key,) for key in keys], num_blocks) == best(0, frozenset())


@pytest.mark.parametrize(("eviction", "victims"), [("lru", [1, 0, 2]), ("lfu", [1, 2, 0]), ("fifo", [0, 1, 2])])
def test_policies_differ_where_they_should(eviction: str, victims: list[int]) -> None:
    """Block 0 came first and is used twice, 2 came last and is used once and last, 1 is not used."""
    index = RadixIndex(make_eviction_policy(eviction))
    for key in range(3):
        index.insert((key,), [BlockId(key)])
    for key in (0, 0, 2):
        index.unlock(index.lock(index.match((key,))))
    assert index.evict(2) + index.evict(1) == victims


def test_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match=r"eviction: 'LRU' is not known, must be one of lru, lfu, fifo"):
        make_eviction_policy("LRU")


def test_a_run_keeps_its_place_in_fifo_order_while_it_is_in_use() -> None:
    """Its rank does not change, so it must come back into the queue by itself."""
    index = RadixIndex(make_eviction_policy("fifo"))
    for key in range(3):
        index.insert((key,), [BlockId(key)])
    node = index.lock(index.match((0,)))
    assert index.evict(1) == [1]
    index.unlock(node)
    assert index.evict(2) == [0, 2]


def test_a_run_keeps_its_place_when_the_queue_is_swept() -> None:
    queue = EvictionQueue(make_eviction_policy("fifo"))
    nodes = [RadixNode(None, [serial], [BlockId(serial)], 1, serial) for serial in range(1, 3000)]
    for created, node in enumerate(nodes):
        node.created = created
        node.num_locks = 1  # out of use only while it is offered, so that a sweep finds none to keep
        queue.offer(node)
    assert len(queue) < len(nodes)
    for node in nodes:
        node.num_locks = 0
        queue.offer(node)
    assert queue.first() is nodes[0]
    assert len(queue) == len(nodes)


def test_both_halves_of_a_split_run_keep_its_age() -> None:
    index = RadixIndex(make_eviction_policy("fifo"))
    index.insert((0,), [BlockId(0)])
    index.insert((1, 2), [BlockId(1), BlockId(2)])
    index.unlock(index.lock(index.match((1,))))  # splits the second run
    oldest = index.lock(index.match((0,)))
    assert index.evict(1) == [2]
    index.unlock(oldest)
    assert index.evict(2) == [0, 1]
