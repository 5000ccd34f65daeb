"""A request as the control plane keeps it, from its admission to its end."""

from enum import StrEnum

from sagellm.control_plane.instance_view import InstanceView
from sagellm.control_plane.queued_request import QueuedRequest
from sagellm.core.request import FinishReason, RequestSpec


class Stage(StrEnum):
    """How far it has come."""

    QUEUED = "queued"
    PREFILL = "prefill"  # on an instance, first token not out
    HANDOVER = "handover"  # prefilled; on its way to a decode instance
    DECODE = "decode"


class AcceptedRequest(QueuedRequest):
    """A request from its admission to its end; as it was queued last, and what has become of it since."""

    __slots__ = (
        "assigned_ns",
        "attempt",
        "cancelled",
        "hand_over",
        "num_counted_tokens",
        "num_runs",
        "num_sent_tokens",
        "sent_token_ids",
        "stage",
        "target",
        "view",
    )

    def __init__(self, spec: RequestSpec) -> None:
        super().__init__(spec)
        self.stage = Stage.QUEUED
        self.view: InstanceView | None = None  # its owner
        self.hand_over = False
        self.target: InstanceView | None = None  # where its KV is to go
        self.attempt = 0  # hand-overs of this request so far
        self.num_runs = 0  # assignments
        self.assigned_ns = 0
        self.cancelled: FinishReason | None = None  # how it is to end, once a client has cancelled it
        self.num_counted_tokens = 0  # tokens to prefill that the owner's view counts
        # The output that the client is known to have: what it is queued with, should its owner be lost.
        self.num_sent_tokens = 0
        self.sent_token_ids: tuple[int, ...] | None = None

    def sent(self, num_output_tokens: int, output_token_ids: tuple[int, ...] | None) -> None:
        """The client has so much of its output."""
        if num_output_tokens > self.num_sent_tokens:
            self.num_sent_tokens, self.sent_token_ids = num_output_tokens, output_token_ids

    def lose_owner(self) -> None:
        """Nobody runs it any more; what the client does not have yet is to be run again."""
        self.stage = Stage.QUEUED
        self.view = None
        self.hand_over = False
        self.num_counted_tokens = 0
        self.num_output_tokens, self.output_token_ids = self.num_sent_tokens, self.sent_token_ids
