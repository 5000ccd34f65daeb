"""The names that a cluster file may use, from where they are made."""

from sagellm.control_plane.routing import ROUTING_NAMES
from sagellm.control_plane.strategies.base import STRATEGY_NAMES
from sagellm.kv_policy.eviction import EVICTION_POLICIES


def known_strategies() -> tuple[str, ...]:
    return STRATEGY_NAMES


def known_routings() -> tuple[str, ...]:
    return ROUTING_NAMES


def known_evictions() -> tuple[str, ...]:
    return EVICTION_POLICIES
