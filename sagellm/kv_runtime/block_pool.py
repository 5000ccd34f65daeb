"""Physical KV blocks of one instance: which are free."""

from collections.abc import Sequence
from typing import cast

from sagellm.core.identity import BlockId

_REFILL_BLOCKS = 1024
"""How many never used ids are listed at a time. Listing all of them at the start would cost some
36 bytes a block, which counts where one process simulates many instances."""


class BlockPool:
    """Block ids ``0 .. num_blocks - 1``, each free or taken. Who took one is the caller's affair.

    The order is deterministic: the id that came back last is taken first, and ids that were never
    used follow in rising order.
    """

    __slots__ = ("_num_listed", "free_ids", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: {num_blocks}, must be 1 or more")
        self.num_blocks = num_blocks
        self.free_ids: list[BlockId] = []
        """A stack of free ids. Popping one is a legal way to take it, for callers that must be fast;
        an empty stack does not mean that the pool is empty."""
        self._num_listed = 0  # ids below this were listed at some time; the others are free

    @property
    def num_free(self) -> int:
        return len(self.free_ids) + self.num_blocks - self._num_listed

    def take(self, count: int) -> list[BlockId]:
        """Take ``count`` blocks; there must be as many."""
        if count == 0:
            return []
        free_ids = self.free_ids
        if len(free_ids) < count:
            self._list_more(count - len(free_ids))
        assert 0 < count <= len(free_ids), f"take: {count} blocks asked for, {len(free_ids)} are free"
        taken = free_ids[-count:]
        del free_ids[-count:]
        taken.reverse()
        return taken

    def give_back(self, block_ids: list[BlockId]) -> None:
        """Make taken blocks free again. The list becomes the pool's: its order is no longer what it was."""
        block_ids.reverse()
        self.free_ids.extend(block_ids)

    def list_free(self) -> list[BlockId]:
        """All free ids, for checks; costs time in proportion to the pool."""
        return self.free_ids + cast("list[BlockId]", list(range(self._num_listed, self.num_blocks)))

    def _list_more(self, count: int) -> None:
        end = min(self.num_blocks, self._num_listed + max(count, _REFILL_BLOCKS))
        fresh_ids = range(end - 1, self._num_listed - 1, -1)
        self.free_ids[:0] = cast("Sequence[BlockId]", fresh_ids)
        self._num_listed = end
