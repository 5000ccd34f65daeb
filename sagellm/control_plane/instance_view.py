"""What the control plane knows of an instance: what it sent there, less what came back.

Nothing here depends on how often an instance reports steps, so a view is the same whether a device
walks through its steps or jumps over them.
"""

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId
from sagellm.core.messages import InstanceJoined

DISPATCH_STEPS = 4
"""Two steps in flight, one being planned, and one on its way to the instance."""


class InstanceView:
    """One instance's load, kept up to date by the control plane; policies only read it."""

    __slots__ = (
        "dispatch_tokens_max",
        "instance_id",
        "load",
        "max_num_batched_tokens",
        "max_num_seqs",
        "num_kv_tokens",
        "num_prefill_tokens",
        "num_requests",
        "num_token_slots",
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
        self.num_kv_tokens = 0  # prompt tokens of these requests
        self.load = 0.0

    def has_room(self, num_tokens: int) -> bool:
        """True where a request with so many tokens to prefill may be sent; an idle one takes any."""
        return not self.num_prefill_tokens or self.num_prefill_tokens + num_tokens <= self.dispatch_tokens_max

    def add(self, *, num_requests: int = 0, num_prefill_tokens: int = 0, num_kv_tokens: int = 0) -> None:
        """Change the counts and the load that follows from them.

        The load adds up what the instance has of each of its limits: full steps of prefill ahead, the
        share of its places taken, and the share of its KV cache spoken for.
        """
        self.num_requests += num_requests
        self.num_prefill_tokens += num_prefill_tokens
        self.num_kv_tokens += num_kv_tokens
        self.load = (
            self.num_prefill_tokens / self.max_num_batched_tokens
            + self.num_requests / self.max_num_seqs
            + self.num_kv_tokens / self.num_token_slots
        )
