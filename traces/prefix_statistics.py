"""How often a trace's prompts could be served from a cache of blocks."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from traces.request_trace import Trace

LRU_CAPACITIES_BLOCKS = (1_000, 3_000, 10_000, 30_000, 50_000, 100_000)


@dataclass(frozen=True, slots=True)
class PrefixStatistics:
    """Reuse of content blocks, the last and shorter block of a prompt counted like any other."""

    block_size: int  # tokens
    num_blocks: int  # over all requests
    num_distinct_blocks: int
    infinite_hit_ratio: float  # of blocks, with a cache that never evicts
    lru_hit_ratios: tuple[tuple[int, float], ...]  # (capacity in blocks, hit ratio)
    num_sharing_requests: int  # requests of which two or more leading blocks were seen before


def prefix_statistics(
    trace: Trace, capacities_blocks: Sequence[int] = LRU_CAPACITIES_BLOCKS
) -> PrefixStatistics | None:
    """Block hit ratios of an infinite cache and of flat LRU caches; None where the trace has no content."""
    contents = [request.content_ids for request in trace.requests]
    num_blocks = sum(map(len, contents))
    if not num_blocks:
        return None
    seen: set[int] = set()
    num_sharing = 0
    for content_ids in contents:
        num_sharing += len(content_ids) > 1 and content_ids[1] in seen
        seen.update(content_ids)
    return PrefixStatistics(
        block_size=trace.content_block_size,
        num_blocks=num_blocks,
        num_distinct_blocks=len(seen),
        infinite_hit_ratio=1 - len(seen) / num_blocks,
        lru_hit_ratios=tuple((capacity, lru_hit_ratio(contents, capacity)) for capacity in capacities_blocks),
        num_sharing_requests=num_sharing,
    )


def lru_hit_ratio(contents: Iterable[Sequence[int]], capacity_blocks: int) -> float:
    """The share of blocks found in one flat LRU list of ``capacity_blocks``, blocks touched in prompt order."""
    cache: OrderedDict[int, None] = OrderedDict()
    num_hits = num_blocks = 0
    touch, evict = cache.move_to_end, cache.popitem
    for content_ids in contents:
        num_blocks += len(content_ids)
        for block in content_ids:
            if block in cache:
                touch(block)
                num_hits += 1
            else:
                cache[block] = None
                if len(cache) > capacity_blocks:
                    evict(last=False)
    return num_hits / num_blocks if num_blocks else 0.0
