"""How much of a trace's prompts a prefix cache of some size would hold: without time, requests one by one."""

from collections.abc import Hashable, Sequence
from heapq import heappop, heappush

from sagellm.kv_policy.eviction import make_eviction_policy
from sagellm.kv_runtime.block_pool import BlockPool
from sagellm.prefix_reuse.radix_index import RadixIndex


def count_hit_blocks(prompts: Sequence[tuple[Hashable, ...]], num_blocks: int, eviction: str = "lru") -> int:
    """Blocks found in a cache of ``num_blocks``, when each prompt is looked up and then cached whole.

    A prompt is a sequence of block keys (``block_keys.py``). Nothing stays in use between prompts.
    Of a prompt that is longer than the cache, the first ``num_blocks`` blocks take part.
    """
    index = RadixIndex(make_eviction_policy(eviction))
    pool = BlockPool(num_blocks)
    num_hits = 0
    for prompt in prompts:
        keys = prompt[:num_blocks]
        match = index.match(keys)
        num_hits += match.num_blocks
        block_ids = index.block_ids(match)
        node = index.lock(match)  # what is there must not give way to the rest of the same prompt
        num_new = len(keys) - match.num_blocks
        if num_new > pool.num_free:
            pool.give_back(index.evict(num_new - pool.num_free))
        node, _ = index.extend_lock(node, keys, block_ids + pool.take(num_new))
        index.unlock(node)
    return num_hits


def count_optimal_hit_blocks(prompts: Sequence[tuple[Hashable, ...]], num_blocks: int) -> int:
    """The most blocks that any policy could find: a bound from above, which needs to know the future.

    Belady's rule (1966), keep what is needed soonest, with leave not to cache at all, on single
    blocks. Keys must differ wherever their blocks do; a block may hit without those before it, which
    no prefix cache can do, so no policy is better than this.
    """
    keys = [key for prompt in prompts for key in prompt]
    next_uses = _next_uses(keys)
    kept_until: dict[Hashable, int] = {}  # cached key -> the position that uses it next
    latest_first: list[tuple[int, Hashable]] = []  # entries of keys that were used since are out of date
    num_hits = 0
    for key, next_use in zip(keys, next_uses, strict=True):
        if kept_until.pop(key, None) is not None:
            num_hits += 1
        if next_use == len(keys):
            continue
        kept_until[key] = next_use
        heappush(latest_first, (-next_use, key))
        while len(kept_until) > num_blocks:
            minus_next_use, victim = heappop(latest_first)
            if kept_until.get(victim) == -minus_next_use:
                del kept_until[victim]
    return num_hits


def _next_uses(keys: Sequence[Hashable]) -> list[int]:
    """For each position, the next one that has the same key; the number of keys where there is none."""
    never = len(keys)
    following: dict[Hashable, int] = {}
    next_uses = [never] * never
    for position in range(never - 1, -1, -1):
        next_uses[position] = following.get(keys[position], never)
        following[keys[position]] = position
    return next_uses
