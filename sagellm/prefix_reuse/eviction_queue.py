"""Evictable leaves in order of rank."""

from heapq import heapify, heappop, heappush

from sagellm.kv_policy.eviction import EvictionPolicy, Rank
from sagellm.prefix_reuse.radix_node import RadixNode

_COMPACT_MIN = 1024


class EvictionQueue:
    """A heap whose entries may be out of date; they are dropped when they come up.

    An entry counts while its node is evictable and still ranks as it did. Each offer costs
    O(log n) amortised: the heap is rebuilt when it has doubled since it was last known to be clean.
    """

    __slots__ = ("_compact_above", "_heap", "_policy")

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._heap: list[tuple[Rank, int, RadixNode]] = []
        self._compact_above = _COMPACT_MIN

    def __len__(self) -> int:
        """Entries, those that are out of date included."""
        return len(self._heap)

    def offer(self, node: RadixNode) -> None:
        """Queue an evictable node; to be called whenever one becomes evictable or is touched."""
        rank = self._policy.rank(node)
        if node.queued_rank == rank:
            return
        node.queued_rank = rank
        heappush(self._heap, (rank, node.serial, node))
        if len(self._heap) > self._compact_above:
            self._compact()

    def first(self) -> RadixNode | None:
        """The node to evict from; None where none is evictable. It stays queued while it has blocks."""
        heap = self._heap
        while heap:
            rank, _, node = heap[0]
            if node.queued_rank == rank:
                if node.is_evictable:
                    return node
                node.queued_rank = None
            heappop(heap)
        return None

    def _compact(self) -> None:
        live = []
        for entry in self._heap:
            rank, _, node = entry
            if node.queued_rank != rank:
                continue
            if node.is_evictable:
                live.append(entry)
            else:
                node.queued_rank = None
        heapify(live)
        self._heap = live
        self._compact_above = max(_COMPACT_MIN, 2 * len(live))
