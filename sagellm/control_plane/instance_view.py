"""What the control plane knows of an instance: what it sent there, less what came back.

Nothing here depends on how often an instance reports steps, so a view is the same whether a device
walks through its steps or jumps over them.
"""

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId
from sagellm.core.messages import InstanceJoined

DISPATCH_STEPS = 5
"""Two steps in flight, one being planned, one on its way to the instance, one for prompts that steps share."""


class InstanceView:
    """One instance's load, kept up to date by the control plane; policies only read it."""

    __slots__ = (
        "_is_load_known",
        "_load",
        "dispatch_tokens_max",
        "instance_id",
        "max_num_batched_tokens",
        "max_num_seqs",
        "num_kv_tokens",
        "num_prefill_tokens",
        "num_requests",
        "num_token_slots",
        "num_window_tokens",
        "role",
    )

    def __init__(self, joined: InstanceJoined, dispatch_tokens_max: int) -> None:
        self.dispatch_tokens_max = dispatch_tokens_max or DISPATCH_STEPS * joined.max_num_batched_tokens
        self.instance_id: InstanceId = joined.instance_id
        self.role: Role = joined.role
        self.num_token_slots = joined.num_token_slots
        self.max_num_seqs = joined.max_num_seqs
        self.max_num_batched_tokens = joined.max_num_batched_tokens
        self.num_requests = 0  # sent there, not yet ended or moved on
        self.num_prefill_tokens = 0  # of these, tokens not yet prefilled
        self.num_window_tokens = 0  # of these, what counts towards dispatch_tokens_max
        self.num_kv_tokens = 0  # prompt tokens of these requests
        self._load, self._is_load_known = 0.0, True

    def has_room(self, num_tokens: int) -> bool:
        """True where a request with so many tokens to prefill may be sent; an idle one takes any."""
        return not self.num_window_tokens or self.num_window_tokens + self._in_window(num_tokens) <= (
            self.dispatch_tokens_max
        )

    def _in_window(self, num_tokens: int) -> int:
        """What a request counts for: one step's worth at most.

        How far an instance has come with a prompt is not known here. If a long one counted as a whole until its end,
        the instance would run short of others to fill its steps with.
        """
        return min(num_tokens, self.max_num_batched_tokens)

    def add(self, *, num_requests: int = 0, num_prefill_tokens: int = 0, num_kv_tokens: int = 0) -> None:
        """Change the counts, by what one request has of each."""
        self.num_requests += num_requests
        self.num_prefill_tokens += num_prefill_tokens
        if num_prefill_tokens > 0:
            self.num_window_tokens += self._in_window(num_prefill_tokens)
        else:
            self.num_window_tokens -= self._in_window(-num_prefill_tokens)
        self.num_kv_tokens += num_kv_tokens
        self._is_load_known = False

    @property
    def load(self) -> float:
        """What the instance has of each of its limits, added up.

        That is full steps of prefill ahead, the share of its places taken, and the share of its KV cache spoken for.
        It is worked out when it is asked for: counts change more often than requests are routed.
        """
        if not self._is_load_known:
            self._is_load_known = True
            self._load = (
                self.num_prefill_tokens / self.max_num_batched_tokens
                + self.num_requests / self.max_num_seqs
                + self.num_kv_tokens / self.num_token_slots
            )
        return self._load
