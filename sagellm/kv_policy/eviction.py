"""In which order cached KV that nobody uses gives way."""

from collections.abc import Callable
from typing import Protocol

Rank = tuple[int, ...]
"""A place in the order of eviction: the smallest goes first."""


class CachedRun(Protocol):
    """What a policy may know of a run of cached blocks. Times are a logical count of uses, no clock."""

    @property
    def created(self) -> int:
        """When the run was cached."""

    @property
    def last_use(self) -> int:
        """When a request last took hold of the run or let go of it."""

    @property
    def num_uses(self) -> int:
        """How many times a request took hold of the run."""


class EvictionPolicy(Protocol):
    """Orders runs that could be evicted. The rank of a run that nobody touches must not change."""

    def rank(self, run: CachedRun) -> Rank: ...


class LeastRecentlyUsed:
    """The run that has been out of use for longest goes first."""

    def rank(self, run: CachedRun) -> Rank:
        return (run.last_use,)


class LeastFrequentlyUsed:
    """The run that was used least often goes first; of those, the least recently used."""

    def rank(self, run: CachedRun) -> Rank:
        return (run.num_uses, run.last_use)


class FirstInFirstOut:
    """The run that was cached first goes first, however much it is used."""

    def rank(self, run: CachedRun) -> Rank:
        return (run.created,)


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
    "fifo": FirstInFirstOut,
}

EVICTION_POLICIES = tuple(_POLICIES)
"""The names that ``make_eviction_policy`` knows."""


def make_eviction_policy(name: str) -> EvictionPolicy:
    """The policy of that name. Raises ValueError where there is none."""
    if name not in _POLICIES:
        raise ValueError(f"eviction: {name!r} is not known, must be one of {', '.join(EVICTION_POLICIES)}")
    return _POLICIES[name]()
