"""The KV blocks of one instance: free, held by requests, or cached for prompts to come."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sagellm.core.identity import BlockId
from sagellm.core.request import RequestSpec
from sagellm.kv_policy.eviction import make_eviction_policy
from sagellm.kv_runtime.block_pool import BlockPool
from sagellm.prefix_reuse.block_keys import BlockKeys, prompt_block_keys, token_block_keys, token_run_keys
from sagellm.prefix_reuse.radix_index import PrefixMatch, RadixIndex
from sagellm.prefix_reuse.radix_node import RadixNode


class RequestBlocks:
    """One request's block table, and what the request owes for it. Made by ``KVCache.admit``.

    ``block_ids`` is the table, in logical order. The content of its first ``num_shared`` blocks is
    in the prefix index, where the request holds a lock on it (``locked_node``). See
    ``KVCache.release`` for who owns which block.
    """

    __slots__ = ("block_ids", "duplicate_ids", "keys", "locked_node", "num_shared", "released")

    def __init__(
        self, block_ids: list[BlockId], num_shared: int, locked_node: RadixNode | None, keys: BlockKeys
    ) -> None:
        self.block_ids = block_ids
        self.num_shared = num_shared
        self.locked_node = locked_node  # None: the request has nothing to do with the index
        self.keys = keys  # of the prompt's full blocks; empty where they have no identity
        self.duplicate_ids: list[BlockId] = []
        self.released = False


class KVCache:
    """The one thing that an instance asks about KV blocks.

    A request is matched, admitted, grown, published and released, in this order; growing and
    publishing may be repeated. A match may be used until an ``admit`` or ``grow`` evicts some of it;
    using it later is an assertion error, not a wrong block.
    """

    __slots__ = ("_free_ids", "_index", "_live", "_matched_keys", "_matched_request", "_pool", "block_size",
                 "num_blocks", "prefix_caching")  # fmt: skip

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool, eviction: str = "lru") -> None:
        """Raises ValueError for a size below 1 or an unknown name of an eviction policy."""
        if block_size < 1:
            raise ValueError(f"block_size: {block_size}, must be 1 or more")
        self.num_blocks = num_blocks
        self.block_size = block_size  # tokens
        self.prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)
        self._free_ids = self._pool.free_ids
        self._index = RadixIndex(make_eviction_policy(eviction))
        self._live: dict[RequestBlocks, None] = {}
        # A waiting request is matched again and again until it fits; its keys are made once.
        self._matched_request: RequestSpec | None = None
        self._matched_keys: BlockKeys = ()

    @property
    def num_free(self) -> int:
        """Blocks that can be had now without evicting any."""
        return self._pool.num_free

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: free ones, and cached ones that nobody uses."""
        return self._pool.num_free + self._index.num_evictable

    @property
    def num_in_use(self) -> int:
        """Blocks that requests hold; one that several share counts once."""
        return self.num_blocks - self._pool.num_free - self._index.num_evictable

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix index, in use or not."""
        return self._index.num_cached

    # --- admission ----------------------------------------------------------------------------------

    def match(self, request: RequestSpec) -> PrefixMatch | None:
        """The cached prefix of the prompt, short of its last token, which must be computed.

        None where prefix caching is off or the prompt has no identity. Changes nothing.
        """
        keys = self._prompt_keys(request)
        if not keys:
            return None
        return self._index.match(keys, (request.num_prompt_tokens - 1) // self.block_size)

    def num_new_blocks(self, match: PrefixMatch | None, num_tokens: int) -> int:
        """Blocks to be taken so that a table has room for ``num_tokens`` tokens, the match included."""
        num_blocks = -(-num_tokens // self.block_size)
        return num_blocks if match is None else max(0, num_blocks - match.num_blocks)

    def can_admit(self, match: PrefixMatch | None, num_tokens: int, watermark_blocks: int) -> bool:
        """True where ``admit`` would succeed and leave ``watermark_blocks`` available."""
        num_left = self.num_available - self.num_new_blocks(match, num_tokens)
        if match is not None:
            num_left -= self._index.num_lockable(match)
        return num_left >= watermark_blocks

    def admit(self, request: RequestSpec, match: PrefixMatch | None, num_tokens: int) -> RequestBlocks:
        """Give a request a table for ``num_tokens`` tokens that starts with the match's blocks."""
        assert self.can_admit(match, num_tokens, 0), f"admit: no room for {num_tokens} tokens of {request.request_id}"
        if match is None:
            blocks = RequestBlocks(self._take(self.num_new_blocks(None, num_tokens)), 0, None, ())
        else:
            shared_ids = self._index.block_ids(match)
            locked_node = self._index.lock(match)  # first, so that the match itself is not evicted
            new_ids = self._take(self.num_new_blocks(match, num_tokens))
            blocks = RequestBlocks(shared_ids + new_ids, match.num_blocks, locked_node, match.keys)
        self._live[blocks] = None
        return blocks

    # --- life of a request --------------------------------------------------------------------------

    def grow(self, blocks: RequestBlocks, count: int) -> tuple[BlockId, ...]:
        """Append ``count`` blocks to a table, evicting cached ones as needed; the new blocks."""
        assert not blocks.released, "I11 no use after free: grow after release"
        # Any: compiled code would unpack each id to a number, and pack it again into another object.
        free_ids: list[Any] = self._free_ids
        block_ids: list[Any] = blocks.block_ids
        if not 0 < count <= len(free_ids):
            new_ids = self._take(count)
            block_ids += new_ids
            return tuple(new_ids)
        block_id = free_ids.pop()
        block_ids.append(block_id)
        if count == 1:  # which is what most calls ask for
            return (block_id,)
        for _ in range(count - 1):
            block_ids.append(free_ids.pop())
        return tuple(block_ids[-count:])

    def publish(self, request: RequestSpec, blocks: RequestBlocks, num_computed_tokens: int) -> None:
        """Let other requests use the full blocks of the prompt, as far as they have been computed."""
        if not self.prefix_caching:
            return
        keys = self._table_keys(request, blocks)[: num_computed_tokens // self.block_size]
        if not keys:
            return
        if self._cannot_hold_copies(request) and self._index.match(keys).num_blocks > blocks.num_shared:
            return
        self._publish_keys(blocks, keys)

    def publish_output(
        self, request: RequestSpec, blocks: RequestBlocks, output_token_ids: Sequence[int], num_computed_tokens: int
    ) -> None:
        """Let other requests use the full blocks of prompt and output, as far as they were computed.

        Does nothing for a prompt without token ids: the blocks that hold output have no identity.
        """
        if not self.prefix_caching or request.prompt_token_ids is None:
            return
        prompt_keys = self._table_keys(request, blocks)
        token_ids = (*request.prompt_token_ids[len(prompt_keys) * self.block_size :], *output_token_ids)
        if prompt_keys:
            keys = (*prompt_keys, *token_run_keys(token_ids, self.block_size))
        else:
            keys = token_block_keys(token_ids, self.block_size, request.cache_salt)
        self._publish_keys(blocks, keys[: num_computed_tokens // self.block_size])

    # Who owns the blocks of a table:
    #   [0, num_shared)         the index, kept by the request's lock on ``locked_node``; except
    #   duplicate_ids           some of these places, where the same content was published by another
    #                           request first: the index has the other's block, locked by this request
    #                           too, while the table's own block stays this request's;
    #   [num_shared, ...)       the request.
    # An owned block goes back to the free list here, or passes to the index in ``_publish_keys``.
    def release(self, blocks: RequestBlocks) -> None:
        """Take the table back: unlock what is shared, free what is the request's own."""
        assert not blocks.released, "I2 refcount: blocks released twice"
        blocks.released = True
        del self._live[blocks]
        if blocks.locked_node is None:
            self._pool.give_back(blocks.block_ids)
            return
        self._index.unlock(blocks.locked_node)
        self._pool.give_back(blocks.block_ids[blocks.num_shared :])
        self._pool.give_back(blocks.duplicate_ids)

    # --- checks -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError, naming the invariant, unless each block has exactly the owners it should."""
        self._index.check()
        owned = Counter(self._pool.list_free())
        cached = Counter(block_id for node in self._index.walk() for block_id in node.block_ids)
        owned += cached
        locks: Counter[RadixNode] = Counter()
        for blocks in self._live:
            owned.update(blocks.block_ids[blocks.num_shared :])
            owned.update(blocks.duplicate_ids)
            duplicates = Counter(blocks.duplicate_ids)
            for block_id in blocks.block_ids[: blocks.num_shared]:
                assert block_id in cached or block_id in duplicates, "I11 no use after free: a shared block was evicted"
            if blocks.locked_node is not None:
                assert blocks.locked_node.end == blocks.num_shared, "I2 refcount: a lock does not end with its table"
                locks.update(_path(blocks.locked_node))
        assert owned == Counter(range(self.num_blocks)), "I1 conservation: a block has no owner, or several"
        for node in self._index.walk():
            assert node.num_locks == locks[node], "I2 refcount: a node's locks are not those of its requests"

    # --- leaves -------------------------------------------------------------------------------------

    def _prompt_keys(self, request: RequestSpec) -> BlockKeys:
        if not self.prefix_caching:
            return ()
        if request is not self._matched_request:
            self._matched_keys = prompt_block_keys(request, self.block_size)
            self._matched_request = request
        return self._matched_keys

    def _table_keys(self, request: RequestSpec, blocks: RequestBlocks) -> BlockKeys:
        """The prompt's keys, made now for a table that was admitted without a match."""
        if not blocks.keys:
            blocks.keys = self._prompt_keys(request)
        return blocks.keys

    def _cannot_hold_copies(self, request: RequestSpec) -> bool:
        """True where the request could fail to fit even alone, if it also held another's copies of its blocks."""
        num_blocks = -(-(request.num_prompt_tokens + request.max_output_tokens) // self.block_size)
        return 2 * num_blocks > self.num_blocks

    def _take(self, count: int) -> list[BlockId]:
        num_free = self._pool.num_free
        if count <= num_free:
            return self._pool.take(count)
        return self._pool.take(num_free) + self._index.evict(count - num_free)

    def _publish_keys(self, blocks: RequestBlocks, keys: BlockKeys) -> None:
        """Pass the blocks of ``keys`` to the index, but for those whose content it has already."""
        assert not blocks.released, "I11 no use after free: publish after release"
        if len(keys) <= blocks.num_shared:
            return
        node = self._index.root if blocks.locked_node is None else blocks.locked_node
        blocks.locked_node, num_known = self._index.extend_lock(node, keys, blocks.block_ids)
        blocks.duplicate_ids += blocks.block_ids[blocks.num_shared : num_known]
        blocks.num_shared = len(keys)


def _path(node: RadixNode) -> list[RadixNode]:
    """A node and all above it, but for the root."""
    path = []
    while node.parent is not node:
        path.append(node)
        node = node.parent
    return path
