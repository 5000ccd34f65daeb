"""A request as the control plane keeps it, from its admission to its end."""

from enum import StrEnum

from sagellm.control_plane.instance_view import InstanceView
from sagellm.control_plane.queued_request import QueuedRequest
from sagellm.core.request import FinishReason


class Stage(StrEnum):
    """How far it has come."""

    QUEUED = "queued"
    PREFILL = "prefill"  # on an instance, first token not out
    HANDOVER = "handover"  # prefilled; on its way to a decode instance
    DECODE = "decode"


class AcceptedRequest:
    """A request from its admission to its end."""

    __slots__ = (
        "assigned_ns",
        "attempt",
        "cancelled",
        "hand_over",
        "num_prefill_tokens",
        "num_runs",
        "output",
        "queued",
        "spec",
        "stage",
        "target",
        "view",
    )

    def __init__(self, queued: QueuedRequest) -> None:
        self.queued = queued
        self.spec = queued.spec
        self.stage = Stage.QUEUED
        self.view: InstanceView | None = None  # its owner
        self.hand_over = False
        self.target: InstanceView | None = None  # where its KV is to go
        self.attempt = 0  # hand-overs of this request so far
        self.num_runs = 0  # assignments
        self.assigned_ns = 0
        self.cancelled: FinishReason | None = None  # how it is to end, once a client has cancelled it
        self.num_prefill_tokens = 0  # of it counted in the owner's view
        # How it is to be queued, should its owner be lost; None: as it was.
        self.output: QueuedRequest | None = None

    def sent(self, num_output_tokens: int, output_token_ids: tuple[int, ...] | None) -> None:
        """The client has so much of its output."""
        known = self.output or self.queued
        if num_output_tokens > known.num_output_tokens:
            self.output = QueuedRequest(self.spec, num_output_tokens, output_token_ids)
