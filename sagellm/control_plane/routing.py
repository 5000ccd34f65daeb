"""Which instance takes a request. Policies are pure: they read views and say who."""

from collections.abc import Mapping
from typing import ClassVar

from sagellm.control_plane.instance_view import InstanceView
from sagellm.core.identity import InstanceId
from sagellm.core.randomness import Rng

ROUTING_NAMES = ("round_robin", "least_loaded", "power_of_two", "prefix_affinity")


class RoutingPolicy:
    """Chooses among candidates; there is always at least one, and their order never changes."""

    needs_prefix_hits: ClassVar[bool] = False

    def choose(
        self, candidates: list[InstanceView], num_tokens: int, hit_tokens: Mapping[InstanceId, int]
    ) -> InstanceView:
        """``num_tokens`` are to be prefilled; ``hit_tokens`` of them are probably cached, by instance."""
        raise NotImplementedError


class RoundRobin(RoutingPolicy):
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(
        self, candidates: list[InstanceView], num_tokens: int, hit_tokens: Mapping[InstanceId, int]
    ) -> InstanceView:
        view = candidates[self._next % len(candidates)]
        self._next += 1
        return view


class LeastLoaded(RoutingPolicy):
    """The least `InstanceView.load`; the first of equals."""

    def choose(
        self, candidates: list[InstanceView], num_tokens: int, hit_tokens: Mapping[InstanceId, int]
    ) -> InstanceView:
        return _least_loaded(candidates)


class PowerOfTwo(RoutingPolicy):
    """The less loaded of two drawn at random (Mitzenmacher, 2001): nearly as even as looking at all."""

    def __init__(self, rng: Rng) -> None:
        self._rng = rng

    def choose(
        self, candidates: list[InstanceView], num_tokens: int, hit_tokens: Mapping[InstanceId, int]
    ) -> InstanceView:
        if len(candidates) == 1:
            return candidates[0]
        first = self._rng.randrange(len(candidates))
        second = self._rng.randrange(len(candidates) - 1)
        second += second >= first
        return _least_loaded([candidates[min(first, second)], candidates[max(first, second)]])


class PrefixAffinity(RoutingPolicy):
    """The least load once the request is there, where cached tokens are no load.

    A hit of h tokens is worth exactly the h tokens of prefill that it saves: an instance is not
    preferred for its cache when its queue costs more than the hit saves.
    """

    needs_prefix_hits: ClassVar[bool] = True

    def choose(
        self, candidates: list[InstanceView], num_tokens: int, hit_tokens: Mapping[InstanceId, int]
    ) -> InstanceView:
        if not hit_tokens:
            return _least_loaded(candidates)
        return min(
            candidates,
            key=lambda view: view.load - hit_tokens.get(view.instance_id, 0) / view.max_num_batched_tokens,
        )


def _least_loaded(candidates: list[InstanceView]) -> InstanceView:
    """The first of equals."""
    least = candidates[0]
    if len(candidates) == 1:
        return least
    least_load = least.load
    for view in candidates:
        load = view.load
        if load < least_load:
            least, least_load = view, load
    return least


def make_routing_policy(name: str, rng: Rng) -> RoutingPolicy:
    """Raises ValueError for an unknown name, naming the known ones."""
    match name:
        case "round_robin":
            return RoundRobin()
        case "least_loaded":
            return LeastLoaded()
        case "power_of_two":
            return PowerOfTwo(rng)
        case "prefix_affinity":
            return PrefixAffinity()
        case _:
            raise ValueError(f"routing: {name!r}, must be one of {', '.join(ROUTING_NAMES)}")
