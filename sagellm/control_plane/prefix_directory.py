"""Which instance probably has which prefix in its cache: a hint for routing, never a promise.

It remembers to which instances each block of content was sent, not what they still hold; a wrong
hint costs a prefill, nothing else.
"""

from collections.abc import Hashable, Sequence

from sagellm.core.identity import InstanceId
from sagellm.core.request import RequestSpec


class PrefixDirectory:
    """Content block -> instances that were given it, the least recently used blocks forgotten first."""

    def __init__(self, num_entries_max: int) -> None:
        self._num_entries_max = num_entries_max
        self._holders: dict[Hashable, dict[InstanceId, None]] = {}

    def num_hit_blocks(self, keys: Sequence[Hashable]) -> dict[InstanceId, int]:
        """For each instance with the first block, how many leading blocks it was given."""
        hits: dict[InstanceId, int] = {}
        alive: dict[InstanceId, None] | None = None
        for index, key in enumerate(keys):
            holders = self._holders.get(key)
            if holders is None:
                break
            alive = dict.fromkeys(i for i in holders if alive is None or i in alive)
            if not alive:
                break
            hits.update(dict.fromkeys(alive, index + 1))
        return hits

    def record(self, keys: Sequence[Hashable], instance_id: InstanceId) -> None:
        """The instance is about to compute, and so to cache, these blocks."""
        for key in keys:
            holders = self._holders.pop(key, None)
            if holders is None:
                holders = {}
            holders[instance_id] = None
            self._holders[key] = holders
        while len(self._holders) > self._num_entries_max:
            del self._holders[next(iter(self._holders))]

    def forget(self, instance_id: InstanceId) -> None:
        """The instance is gone, and its cache with it."""
        for holders in self._holders.values():
            holders.pop(instance_id, None)


ROUTING_BLOCK_TOKENS = 256
"""Tokens for each key of a prompt that comes as token ids; a finer grain would not route better."""


def routing_keys(request: RequestSpec) -> tuple[tuple[Hashable, ...], int]:
    """Keys of the prompt's content, each good for all content before it too, and the tokens in each."""
    if request.prompt_token_ids is None:
        return tuple((request.cache_salt, content_id) for content_id in request.content_ids), request.content_block_size
    token_ids = request.prompt_token_ids
    keys: list[Hashable] = []
    chained = 0
    for start in range(0, len(token_ids) - ROUTING_BLOCK_TOKENS + 1, ROUTING_BLOCK_TOKENS):
        # The hash of integers is the same in every process; a collision would only misroute.
        chained = hash((chained, token_ids[start : start + ROUTING_BLOCK_TOKENS]))
        keys.append((request.cache_salt, chained))
    return tuple(keys), ROUTING_BLOCK_TOKENS
