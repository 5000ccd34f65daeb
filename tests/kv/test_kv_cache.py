"""KVCache: any legal order of calls keeps every block with exactly its owners and its content."""

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from sagellm.core.identity import BlockId, RequestId
from sagellm.core.request import RequestSpec
from sagellm.kv_runtime.kv_cache import KVCache, RequestBlocks

Content = tuple[str, tuple[int, ...]]  # the salt, and all tokens up to the end of what a block holds
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


def make_request(tokens: list[int], salt: str = "", content_block_size: int = 0) -> RequestSpec:
    """A request with token ids, or with content ids that are equal where all tokens so far are."""
    if content_block_size == 0:
        return RequestSpec(RequestId("r"), 0, len(tokens), 8, prompt_token_ids=tuple(tokens), cache_salt=salt)
    ends = range(content_block_size, len(tokens) + content_block_size, content_block_size)
    # A leading 1 makes the number of tokens part of the id.
    ids = tuple(int("1" + "".join(map(str, tokens[:end])), 2) for end in ends)
    return RequestSpec(
        RequestId("r"), 0, len(tokens), 8, content_ids=ids, content_block_size=content_block_size, cache_salt=salt
    )


Identity = tuple[int, int, Content]  # tokens of a content id (0: none), where the block ends, and what identifies it


def identity(request: RequestSpec, tokens: Sequence[int], end: int) -> Identity:
    """Of the block that ends there. With content ids it is that of the whole id: one for fewer tokens is another."""
    known_end = end
    if request.content_block_size:
        known_end = -(-end // request.content_block_size) * request.content_block_size
        tokens = tokens[: request.num_prompt_tokens]
    return request.content_block_size, end, (request.cache_salt, tuple(tokens[:known_end]))


class Running:
    """What the model knows of a request that holds blocks."""

    def __init__(self, request: RequestSpec, tokens: list[int], blocks: RequestBlocks, num_computed: int) -> None:
        self.request = request
        self.tokens = list(tokens)
        self.blocks = blocks
        self.num_computed = num_computed

    def content(self, end: int) -> Content:
        return self.request.cache_salt, tuple(self.tokens[:end])


class KVCacheMachine(RuleBasedStateMachine):
    """Against a model of what each physical block holds, and of where each published prefix is."""

    running = Bundle("running")

    @initialize(
        num_blocks=st.integers(3, 20),
        block_size=st.integers(1, 4),
        prefix_caching=st.sampled_from([True, True, True, False]),
        eviction=st.sampled_from(["lru", "lfu", "fifo"]),
    )
    def start(self, num_blocks: int, block_size: int, prefix_caching: bool, eviction: str) -> None:
        self.cache = KVCache(num_blocks, block_size, prefix_caching, eviction)
        self.block_size = block_size
        self.held: list[Running] = []
        self.written: dict[BlockId, Content | None] = {}
        self.published: dict[Identity, BlockId] = {}

    def hand_out(self, block_ids: Sequence[BlockId]) -> None:
        """The cache gave these blocks to somebody: nobody may have them, and what they held is gone."""
        in_tables = {block_id for other in self.held for block_id in other.blocks.block_ids}
        assert in_tables.isdisjoint(block_ids)
        assert len(set(block_ids)) == len(block_ids)
        self.written.update(dict.fromkeys(block_ids))
        self.published = {key: value for key, value in self.published.items() if value not in block_ids}

    def known_prefix(self, request: RequestSpec, tokens: list[int]) -> list[BlockId]:
        """The blocks that a match must find."""
        found = []
        for end in range(self.block_size, len(tokens), self.block_size):
            block_id = self.published.get(identity(request, tokens, end))
            if block_id is None:
                break
            found.append(block_id)
        return found

    @rule(
        target=running,
        tokens=TOKENS,
        salt=st.sampled_from(["", "", "salt"]),
        ratio=st.sampled_from([0, 0, 1, 2]),
        share=st.floats(0, 1),
        with_match=st.booleans(),
    )
    def admit(
        self, tokens: list[int], salt: str, ratio: int, share: float, with_match: bool
    ) -> Running | MultipleResults[Running]:
        request = make_request(tokens, salt, ratio * self.block_size)
        num_available = self.cache.num_available
        match = self.cache.match(request) if with_match else None
        assert self.cache.num_available == num_available
        expected = self.known_prefix(request, tokens) if with_match and self.cache.prefix_caching else []
        num_matched = 0 if match is None else match.num_blocks
        assert num_matched == len(expected)
        num_tokens = max(int(share * len(tokens)), num_matched * self.block_size)
        if not self.cache.can_admit(match, num_tokens, 0):
            assert self.held or -(-num_tokens // self.block_size) > self.cache.num_blocks
            return multiple()
        num_new = self.cache.num_new_blocks(match, num_tokens)
        blocks = self.cache.admit(request, match, num_tokens)
        assert blocks.block_ids[:num_matched] == expected
        assert len(blocks.block_ids) == num_matched + num_new == -(-num_tokens // self.block_size)
        self.hand_out(blocks.block_ids[num_matched:])
        entry = Running(request, tokens, blocks, num_matched * self.block_size)
        self.held.append(entry)
        return entry

    @rule(entry=running, count=st.integers(1, 3))
    def grow(self, entry: Running, count: int) -> None:
        if entry.blocks.released or self.cache.num_available < count:
            return
        num_before = len(entry.blocks.block_ids)
        new_ids = self.cache.grow(entry.blocks, count)
        assert len(new_ids) == count
        assert tuple(entry.blocks.block_ids[num_before:]) == new_ids
        table = entry.blocks.block_ids
        del table[num_before:]  # for the model's check, these blocks are not in any table yet
        self.hand_out(new_ids)
        table += new_ids

    @rule(entry=running, count=st.integers(1, 9), next_tokens=st.lists(st.integers(0, 1), min_size=9, max_size=9))
    def compute(self, entry: Running, count: int, next_tokens: list[int]) -> None:
        """Write KV into the table's blocks, past the end of the prompt as well."""
        if entry.blocks.released:
            return
        end = min(entry.num_computed + count, len(entry.blocks.block_ids) * self.block_size)
        entry.tokens += next_tokens[: max(0, end - len(entry.tokens))]
        for position in range(entry.num_computed, end):
            block_id = entry.blocks.block_ids[position // self.block_size]
            readers = sum(block_id in other.blocks.block_ids for other in self.held)
            assert readers == 1, "I11: a shared block is written to"
            self.written[block_id] = entry.content(position + 1)
        entry.num_computed = max(entry.num_computed, end)

    def note_published(self, entry: Running, num_tokens: int) -> None:
        for index in range(num_tokens // self.block_size):
            key = identity(entry.request, entry.tokens, (index + 1) * self.block_size)
            self.published.setdefault(key, entry.blocks.block_ids[index])

    @rule(entry=running)
    def publish(self, entry: Running) -> None:
        if entry.blocks.released:
            return
        self.cache.publish(entry.request, entry.blocks, entry.num_computed)
        if self.cache.prefix_caching:
            self.note_published(entry, min(entry.num_computed, entry.request.num_prompt_tokens))

    @rule(entry=running)
    def publish_output(self, entry: Running) -> None:
        if entry.blocks.released:
            return
        output_ids = entry.tokens[entry.request.num_prompt_tokens :]
        self.cache.publish_output(entry.request, entry.blocks, output_ids, entry.num_computed)
        if self.cache.prefix_caching and entry.request.prompt_token_ids is not None:
            self.note_published(entry, entry.num_computed)

    @rule(entry=consumes(running))
    def release(self, entry: Running) -> None:
        if entry.blocks.released:
            return
        self.cache.release(entry.blocks)
        self.held.remove(entry)

    @precondition(lambda self: hasattr(self, "cache") and self.held)
    @rule()
    def release_all(self) -> None:
        """Quiescence: with no request left, every block can be had again."""
        for entry in self.held:
            self.cache.release(entry.blocks)
        self.held.clear()
        assert self.cache.num_available == self.cache.num_blocks
        assert self.cache.num_in_use == 0

    @invariant()
    def blocks_have_their_owners(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            assert self.cache.num_cached == len(self.published)

    @invariant()
    def blocks_hold_what_their_readers_expect(self) -> None:
        """I4: whatever was computed or matched is still there, in every table."""
        for entry in getattr(self, "held", []):
            for index in range(entry.num_computed // self.block_size):
                block_id = entry.blocks.block_ids[index]
                assert self.written[block_id] == entry.content((index + 1) * self.block_size)


KVCacheMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestKVCacheMachine = KVCacheMachine.TestCase


def test_output_may_be_published_before_the_whole_prompt() -> None:
    """Also by a request that was admitted without a match, whose keys are not known from one."""
    cache = KVCache(4, 2, prefix_caching=True)
    request = make_request([0, 0, 0, 0])
    blocks = cache.admit(request, None, 4)
    cache.publish_output(request, blocks, [], 2)
    assert cache.num_cached == 1
    cache.publish(request, blocks, 4)
    assert cache.num_cached == 2


def test_match_leaves_the_last_prompt_token_to_compute() -> None:
    cache = KVCache(8, 4, prefix_caching=True)
    request = make_request([0, 1] * 4)
    blocks = cache.admit(request, cache.match(request), 8)
    cache.publish(request, blocks, 8)
    match = cache.match(request)
    assert match is not None
    assert match.num_blocks == 1  # of the two that are cached


def test_blocks_that_the_match_would_lock_are_not_available_to_it() -> None:
    cache = KVCache(4, 4, prefix_caching=True)
    first = make_request([0] * 9)
    blocks = cache.admit(first, cache.match(first), 9)
    cache.publish(first, blocks, 9)
    cache.release(blocks)
    match = cache.match(first)
    assert cache.num_available == 4  # two cached, two free
    assert cache.can_admit(match, 16, 0)
    assert not cache.can_admit(match, 17, 0)
    assert cache.can_admit(match, 9, 1)
    assert not cache.can_admit(match, 9, 2)


def test_equal_content_published_twice_stays_with_its_second_owner() -> None:
    cache = KVCache(8, 4, prefix_caching=True)
    request = make_request([0] * 8)
    first = cache.admit(request, cache.match(request), 8)
    second = cache.admit(request, cache.match(request), 8)
    cache.publish(request, first, 8)
    cache.publish(request, second, 8)
    cache.check()
    assert cache.num_cached == 2
    assert cache.num_in_use == 4
    cache.release(first)
    assert cache.num_in_use == 4  # the second one's lock holds the first one's blocks
    cache.release(second)
    assert cache.num_in_use == 0
    cache.check()


def test_without_prefix_caching_nothing_is_kept() -> None:
    cache = KVCache(4, 4, prefix_caching=False)
    request = make_request([0] * 8)
    assert cache.match(request) is None
    blocks = cache.admit(request, None, 8)
    cache.publish(request, blocks, 8)
    cache.publish_output(request, blocks, [1, 1], 8)
    cache.release(blocks)
    assert cache.num_cached == 0
    assert cache.match(request) is None


def test_a_match_outlives_a_split_but_not_its_blocks() -> None:
    cache = KVCache(4, 2, prefix_caching=True)
    request = make_request([0] * 7)
    blocks = cache.admit(request, cache.match(request), 6)
    cache.publish(request, blocks, 6)
    cache.release(blocks)
    whole = cache.match(request)
    fork = make_request([0, 0, 1])
    cache.release(cache.admit(fork, cache.match(fork), 2))  # splits the run
    split = cache.admit(request, whole, 6)
    assert split.num_shared == 3
    cache.release(split)
    stale = cache.match(request)
    cache.admit(RequestSpec(RequestId("big"), 0, 8, 1), None, 8)
    with pytest.raises(AssertionError, match="I4"):
        cache.can_admit(stale, 6, 0)


def test_misuse_is_named() -> None:
    cache = KVCache(4, 4, prefix_caching=True)
    request = make_request([0] * 8)
    blocks = cache.admit(request, None, 8)
    cache.release(blocks)
    with pytest.raises(AssertionError, match="I2"):
        cache.release(blocks)
    with pytest.raises(AssertionError, match="I11"):
        cache.grow(blocks, 1)
    with pytest.raises(AssertionError, match="I11"):
        cache.publish(request, blocks, 8)
    with pytest.raises(AssertionError, match="no room"):
        cache.admit(request, None, 17)


def test_check_notices_a_lost_block_and_a_lost_lock() -> None:
    request = make_request([0] * 8)
    leaky = KVCache(4, 4, prefix_caching=True)
    leaky.admit(request, None, 8).block_ids.pop()
    with pytest.raises(AssertionError, match="I1"):
        leaky.check()
    unlocked = KVCache(4, 4, prefix_caching=True)
    blocks = unlocked.admit(request, None, 8)
    unlocked.publish(request, blocks, 8)
    assert blocks.locked_node is not None
    blocks.locked_node.num_locks += 1
    with pytest.raises(AssertionError, match="I2"):
        unlocked.check()


@pytest.mark.parametrize(("num_blocks", "block_size", "eviction"), [(0, 16, "lru"), (4, 0, "lru"), (4, 16, "random")])
def test_bad_limits_are_refused(num_blocks: int, block_size: int, eviction: str) -> None:
    with pytest.raises(ValueError, match=r"must be (1 or more|one of lru, lfu, fifo)"):
        KVCache(num_blocks, block_size, prefix_caching=True, eviction=eviction)
