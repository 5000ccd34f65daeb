"""The instances of a cluster, by what they can be asked, and who of them takes a request."""

from collections.abc import Mapping
from typing import Final

from sagellm.control_plane.instance_view import InstanceView
from sagellm.control_plane.prefix_directory import PrefixDirectory, routing_keys
from sagellm.control_plane.queued_request import QueuedRequest
from sagellm.control_plane.routing import RoutingPolicy, make_routing_policy
from sagellm.core.config import ControlPlaneConfig, Role
from sagellm.core.identity import InstanceId
from sagellm.core.messages import InstanceJoined
from sagellm.core.randomness import Rng
from sagellm.core.request import RequestSpec

_NO_HITS: Final[Mapping[InstanceId, int]] = {}
PREFIX_ENTRIES_MAX = 1_000_000


class Fleet:
    """Views of all instances, kept in lists by role so that choosing one builds nothing."""

    def __init__(self, config: ControlPlaneConfig, rng: Rng) -> None:
        self._config = config
        self.views: dict[InstanceId, InstanceView] = {}
        self._arrivals_to: list[InstanceView] = []
        self.decodes_on: list[InstanceView] = []
        self.is_disaggregated = False
        self._arrival_policy = make_routing_policy(config.routing, rng)
        self._decode_policy = make_routing_policy(config.routing, rng)
        self._short_policy = make_routing_policy(config.routing, rng)
        self._directory = PrefixDirectory(PREFIX_ENTRIES_MAX)
        self._disaggregate_min_tokens = config.disaggregate_min_tokens
        self._needs_hits = self._arrival_policy.needs_prefix_hits or config.disaggregate_min_tokens > 0
        self.num_slots_max = 0  # KV tokens of the largest request that can be served
        self._num_slots_min = 0  # KV tokens of the smallest instance

    def join(self, joined: InstanceJoined) -> None:
        assert joined.instance_id not in self.views, f"{joined.instance_id} joined twice"
        self.views[joined.instance_id] = InstanceView(joined, self._config.dispatch_tokens_max)
        self._sort()

    def lose(self, instance_id: InstanceId) -> InstanceView | None:
        view = self.views.pop(instance_id, None)
        self._directory.forget(instance_id)
        self._sort()
        return view

    def _sort(self) -> None:
        """Who prefills and who decodes. With one of the two gone the others do both."""
        views = list(self.views.values())
        prefill = [view for view in views if view.role is Role.PREFILL]
        decode = [view for view in views if view.role is Role.DECODE]
        mixed = [view for view in views if view.role is Role.MIXED]
        self.decodes_on = decode or mixed
        self._arrivals_to = prefill + mixed or decode
        self.is_disaggregated = bool(prefill) and bool(self.decodes_on)
        # A request must fit where it is prefilled, too: it may have to decode there.
        self.num_slots_max = min(_largest(self._arrivals_to), _largest(self.decodes_on or prefill))
        self._num_slots_min = min((view.num_token_slots for view in views), default=0)

    def place(self, request: QueuedRequest) -> InstanceView | None:
        """The instance for a request.

        None: no instance has room at present. With disaggregation a request whose uncached prompt is
        short goes where it decodes, and is prefilled there.
        """
        hits = self._hit_tokens(request.spec) if self._needs_hits else _NO_HITS
        num_tokens, num_slots = request.num_prefill_tokens, request.num_slots
        min_tokens = self._disaggregate_min_tokens
        if self.is_disaggregated and min_tokens:
            short = [view for view in self.decodes_on if num_tokens - hits.get(view.instance_id, 0) < min_tokens]
            view = self._choose(self._short_policy, short, num_tokens, num_slots, hits)
            if view is not None:
                return view
        return self._choose(self._arrival_policy, self._arrivals_to, num_tokens, num_slots, hits)

    def hands_over(self, view: InstanceView) -> bool:
        """Whether what is prefilled on that instance decodes on another."""
        return self.is_disaggregated and view.role is Role.PREFILL

    def _choose(
        self,
        policy: RoutingPolicy,
        views: list[InstanceView],
        num_tokens: int,
        num_slots: int,
        hits: Mapping[InstanceId, int],
    ) -> InstanceView | None:
        if num_slots > self._num_slots_min:
            views = [view for view in views if view.num_token_slots >= num_slots]
        for view in views:
            if not view.has_room(num_tokens):
                views = [view for view in views if view.has_room(num_tokens)]
                break
        if not views:
            return None
        return policy.choose(views, num_tokens, hits)

    def choose_decode(self, request: QueuedRequest, without: InstanceId | None) -> InstanceView | None:
        """Where a prefilled request goes on, ``without`` being the one that it could not reach."""
        views = [view for view in self.decodes_on if view.instance_id != without]
        views = [view for view in views if view.num_token_slots >= request.num_slots]
        if not views:
            return None
        return self._decode_policy.choose(views, 0, _NO_HITS)

    def dispatched(self, request: RequestSpec, view: InstanceView) -> None:
        """The request's prefix will be in that instance's cache."""
        if self._needs_hits:
            self._directory.record(routing_keys(request)[0], view.instance_id)

    def _hit_tokens(self, request: RequestSpec) -> Mapping[InstanceId, int]:
        keys, block_size = routing_keys(request)
        hits = self._directory.num_hit_blocks(keys)
        limit = request.num_prompt_tokens - 1
        return {instance_id: min(blocks * block_size, limit) for instance_id, blocks in hits.items()}


def _largest(views: list[InstanceView]) -> int:
    return max((view.num_token_slots for view in views), default=0)
