"""One node of the radix index: a run of cached blocks."""

from collections.abc import Hashable, Sequence
from itertools import compress, count
from operator import ne

from sagellm.core.identity import BlockId
from sagellm.kv_policy.eviction import Rank


class RadixNode:
    """A run of blocks that follow each other in every sequence that reaches the last of them.

    ``end`` is the number of blocks from the root to the end of this run. ``num_locks`` counts the
    locks that hold this node; whoever holds a node holds its parent as well. The root holds no
    blocks and is its own parent.
    """

    __slots__ = (
        "block_ids",
        "children",
        "created",
        "end",
        "keys",
        "last_use",
        "num_locks",
        "num_uses",
        "parent",
        "queued_rank",
        "serial",
    )

    def __init__(
        self, parent: "RadixNode | None", keys: list[Hashable], block_ids: list[BlockId], end: int, serial: int
    ) -> None:
        self.parent: RadixNode = self if parent is None else parent
        self.children: dict[Hashable, RadixNode] = {}  # by the first key of each
        self.keys = keys
        self.block_ids = block_ids
        self.end = end
        self.serial = serial  # breaks ties in the order of eviction
        self.created = 0
        self.last_use = 0
        self.num_uses = 0
        self.num_locks = 0
        self.queued_rank: Rank | None = None  # the rank under which the eviction queue has it

    @property
    def start(self) -> int:
        """The number of blocks before this run."""
        return self.end - len(self.block_ids)

    @property
    def is_evictable(self) -> bool:
        """True for a leaf that nobody holds, and that has not been emptied."""
        return not self.children and self.num_locks == 0 and bool(self.block_ids)

    def num_common(self, keys: Sequence[Hashable], start: int, stop: int) -> int:
        """How many leading keys of this run equal ``keys[start:stop]``."""
        run = self.keys
        other = list(keys[start : min(stop, start + len(run))])
        if run == other:
            return len(run)
        return next(compress(count(), map(ne, run, other)), len(other))
