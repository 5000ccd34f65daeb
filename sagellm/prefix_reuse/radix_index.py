"""Which prefixes are cached, and in which blocks: a compressed radix tree over block keys."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from sagellm.core.identity import BlockId
from sagellm.kv_policy.eviction import EvictionPolicy
from sagellm.prefix_reuse.eviction_queue import EvictionQueue
from sagellm.prefix_reuse.radix_node import RadixNode


@dataclass(frozen=True, slots=True, eq=False)
class PrefixMatch:
    """The longest cached prefix of some keys, as of one version of the index.

    ``node`` is the last node that it reaches into, not always to its end.
    """

    num_blocks: int
    keys: tuple[Hashable, ...]  # all that were asked for
    node: RadixNode
    version: int


class RadixIndex:
    """Cached blocks by content. It owns the blocks that are in it, and gives them up by ``evict``.

    A lock keeps a prefix from being evicted. It is named by the node at the prefix's end: nodes are
    split so that a lock covers whole nodes, and a node that is split keeps its lower end, so that
    the name stays good. Recency is a count of the locks and unlocks that there were, never a clock.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        self.num_cached = 0  # blocks
        self.num_evictable = 0  # blocks that no lock covers
        self._queue = EvictionQueue(policy)
        self._use_count = 0
        self._num_nodes_made = 0
        self._version = 0  # moves with every change of structure
        self.root = self._make_node(None, [], [], 0)

    # --- looking up ---------------------------------------------------------------------------------

    def match(self, keys: tuple[Hashable, ...], num_blocks_max: int | None = None) -> PrefixMatch:
        """The longest cached prefix, of at most ``num_blocks_max`` blocks. Changes nothing."""
        stop = len(keys) if num_blocks_max is None else min(len(keys), num_blocks_max)
        node, num_blocks = self._descend(self.root, keys, stop)
        return PrefixMatch(num_blocks, keys, node, self._version)

    def block_ids(self, match: PrefixMatch) -> list[BlockId]:
        """The blocks that hold the match, in order."""
        node = self._locate(match)
        runs = [node.block_ids[: match.num_blocks - node.start]]
        while node is not self.root:
            node = node.parent
            runs.append(node.block_ids)
        return [block_id for run in reversed(runs) for block_id in run]

    def num_lockable(self, match: PrefixMatch) -> int:
        """How many blocks a lock of the match would take away from the evictable ones."""
        node = self._locate(match)
        end = match.num_blocks
        while node.num_locks == 0 and node is not self.root:
            node = node.parent
        # Locks cover whole paths: all blocks below the lowest locked node are free to be evicted.
        return max(0, end - node.end)

    # --- locks --------------------------------------------------------------------------------------

    def lock(self, match: PrefixMatch) -> RadixNode:
        """Keep the matched blocks until ``unlock`` is called with the node that this returns."""
        node = self._locate(match)
        if match.num_blocks < node.end:
            node = self._split(node, match.num_blocks)
        self._lock_up_to(node, self.root)
        return node

    def unlock(self, node: RadixNode) -> None:
        """Give up one lock."""
        self._use_count += 1
        while node is not self.root:
            assert node.num_locks > 0, "I2 refcount: unlocked more often than locked"
            node.num_locks -= 1
            node.last_use = self._use_count
            if node.num_locks == 0:
                self.num_evictable += len(node.block_ids)
                if not node.children:
                    self._queue.offer(node)
            node = node.parent

    # --- growing ------------------------------------------------------------------------------------

    def insert(self, keys: Sequence[Hashable], block_ids: Sequence[BlockId]) -> int:
        """Cache ``block_ids[i]`` as the block of ``keys[i]``, where that is not cached yet.

        Returns how many leading blocks were there already: those of the caller's stay the caller's,
        the others pass to the index. The whole prefix counts as used now.
        """
        node, num_known = self._insert_below(self.root, keys, block_ids)
        self._use_count += 1
        leaf = node
        while node is not self.root:
            node.last_use = self._use_count
            node = node.parent
        if leaf.is_evictable:
            self._queue.offer(leaf)
        return num_known

    def extend_lock(
        self, node: RadixNode, keys: Sequence[Hashable], block_ids: Sequence[BlockId]
    ) -> tuple[RadixNode, int]:
        """``insert``, below a node that the caller has locked, and move the lock to the new end.

        ``keys`` and ``block_ids`` begin at the root. Returns the new name of the lock, and how many
        leading blocks were there already.
        """
        end_node, num_known = self._insert_below(node, keys, block_ids)
        self._lock_up_to(end_node, node)
        return end_node, num_known

    # --- shrinking ----------------------------------------------------------------------------------

    def evict(self, count: int) -> list[BlockId]:
        """Give up ``count`` blocks, in the policy's order of leaves, from the tail of each leaf."""
        assert count <= self.num_evictable, f"evict: {count} blocks asked for, {self.num_evictable} are evictable"
        self.num_evictable -= count
        self.num_cached -= count
        self._version += 1
        evicted: list[BlockId] = []
        while len(evicted) < count:
            leaf = self._queue.first()
            assert leaf is not None, "evictable blocks without an evictable leaf"
            evicted += self._cut_tail(leaf, count - len(evicted))
        return evicted

    # --- checks -------------------------------------------------------------------------------------

    def walk(self) -> Iterator[RadixNode]:
        """All nodes but the root, parents first."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def check(self) -> None:
        """Raise AssertionError unless all counters and links are as a walk of the tree finds them."""
        num_cached = num_evictable = 0
        for node in self.walk():
            num_cached += len(node.block_ids)
            num_evictable += len(node.block_ids) if node.num_locks == 0 else 0
            assert node.block_ids, "an empty node is still linked"
            assert len(node.keys) == len(node.block_ids), "I1 conservation: keys and blocks of a node differ in number"
            assert node.start == node.parent.end, "a node does not start where its parent ends"
            assert node.parent.children[node.keys[0]] is node, "a node is not under its first key"
            held_below = sum(child.num_locks for child in node.children.values())
            assert node.num_locks >= held_below, "I2 refcount: a node is held less often than its children"
        assert num_cached == self.num_cached, f"I1 conservation: {self.num_cached} cached, {num_cached} found"
        assert num_evictable == self.num_evictable, (
            f"I2 refcount: {self.num_evictable} evictable, {num_evictable} found"
        )

    # --- leaves -------------------------------------------------------------------------------------

    def _make_node(
        self, parent: RadixNode | None, keys: list[Hashable], block_ids: list[BlockId], end: int
    ) -> RadixNode:
        self._num_nodes_made += 1
        return RadixNode(parent, keys, block_ids, end, self._num_nodes_made)

    def _descend(self, node: RadixNode, keys: Sequence[Hashable], stop: int) -> tuple[RadixNode, int]:
        """From a node's end, follow ``keys[:stop]``: the last node reached into, and how many keys fit."""
        depth = node.end
        while depth < stop and depth == node.end:
            child = node.children.get(keys[depth])
            if child is None:
                break
            depth += child.num_common(keys, depth, stop)
            node = child
        return node, depth

    def _locate(self, match: PrefixMatch) -> RadixNode:
        """The match's last node now; the index may have changed, but not lost what was matched."""
        if match.version == self._version:
            return match.node
        node, num_blocks = self._descend(self.root, match.keys, match.num_blocks)
        assert num_blocks == match.num_blocks, "I4 no wrong KV: the match is out of date, its blocks were evicted"
        return node

    def _insert_below(
        self, start: RadixNode, keys: Sequence[Hashable], block_ids: Sequence[BlockId]
    ) -> tuple[RadixNode, int]:
        """Make the tree hold all of ``keys`` in whole nodes: the last of them, and how many keys it held."""
        assert len(block_ids) >= len(keys), f"{len(keys)} keys, but {len(block_ids)} blocks"
        node, num_known = self._descend(start, keys, len(keys))
        if num_known < node.end:
            node = self._split(node, num_known)
        num_new = len(keys) - num_known
        if num_new > 0:
            new_ids = list(block_ids[num_known : len(keys)])
            child = self._make_node(node, list(keys[num_known:]), new_ids, len(keys))
            self._use_count += 1
            child.created = child.last_use = self._use_count
            node.children[child.keys[0]] = child
            self.num_cached += num_new
            self.num_evictable += num_new
            self._version += 1
            node = child
        return node, num_known

    def _split(self, node: RadixNode, depth: int) -> RadixNode:
        """Cut a node in two at ``depth`` blocks from the root; the new, upper one."""
        num_upper = depth - node.start
        upper = self._make_node(node.parent, node.keys[:num_upper], node.block_ids[:num_upper], depth)
        upper.created, upper.last_use = node.created, node.last_use
        upper.num_uses, upper.num_locks = node.num_uses, node.num_locks
        upper.parent.children[upper.keys[0]] = upper
        del node.keys[:num_upper], node.block_ids[:num_upper]
        upper.children[node.keys[0]] = node
        node.parent = upper
        self._version += 1
        return upper

    def _lock_up_to(self, node: RadixNode, ancestor: RadixNode) -> None:
        """Lock a node and those above it, short of ``ancestor``."""
        self._use_count += 1
        while node is not ancestor:
            if node.num_locks == 0:
                self.num_evictable -= len(node.block_ids)
            node.num_locks += 1
            node.num_uses += 1
            node.last_use = self._use_count
            node = node.parent

    def _cut_tail(self, leaf: RadixNode, count_max: int) -> list[BlockId]:
        """Take blocks off the end of a leaf, and the leaf off the tree where it has no more."""
        if count_max == 1 and len(leaf.block_ids) > 1:  # what a decoding request asks for
            leaf.end -= 1
            leaf.keys.pop()
            return [leaf.block_ids.pop()]
        count = min(count_max, len(leaf.block_ids))
        cut = leaf.block_ids[: -count - 1 : -1]
        first_key = leaf.keys[0]
        del leaf.block_ids[-count:], leaf.keys[-count:]
        leaf.end -= count
        if not leaf.block_ids:
            parent = leaf.parent
            del parent.children[first_key]
            if parent.is_evictable:
                self._queue.offer(parent)
        return cut
