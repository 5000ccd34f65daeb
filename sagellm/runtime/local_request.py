"""A request as the instance that serves it keeps it."""

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from sagellm.core.request import RequestSpec

if TYPE_CHECKING:
    from sagellm.kv_runtime.kv_cache import RequestBlocks


class RequestState(StrEnum):
    """Where a request stands on its instance. `REQUEST_TRANSITIONS` says what may follow what."""

    WAITING = "waiting"  # holds no blocks
    PREFILLING = "prefilling"  # has blocks; some of its known tokens are not yet planned
    DECODING = "decoding"  # a member of the decode group
    DRAINING = "draining"  # all its tokens are planned; the last are on their way back
    PREFILLED = "prefilled"  # like draining, but it will be handed over when its first token is back
    HANDING_OVER = "handing_over"  # computed; its KV waits for, or is on, its way to a decode instance
    RECEIVING = "receiving"  # has blocks; its KV comes from a prefill instance
    ENDED = "ended"


IN_STEPS = (RequestState.PREFILLING, RequestState.DECODING, RequestState.DRAINING, RequestState.PREFILLED)
"""What a request can be while steps in flight work on it."""

REQUEST_TRANSITIONS: Final[dict[RequestState, frozenset[RequestState]]] = {
    RequestState.WAITING: frozenset({RequestState.PREFILLING, RequestState.ENDED}),
    RequestState.PREFILLING: frozenset(
        {
            RequestState.DECODING,
            RequestState.DRAINING,
            RequestState.PREFILLED,
            RequestState.WAITING,
            RequestState.ENDED,
        }
    ),
    RequestState.DECODING: frozenset({RequestState.DRAINING, RequestState.WAITING, RequestState.ENDED}),
    RequestState.DRAINING: frozenset({RequestState.ENDED, RequestState.WAITING}),
    RequestState.PREFILLED: frozenset({RequestState.HANDING_OVER, RequestState.WAITING, RequestState.ENDED}),
    RequestState.HANDING_OVER: frozenset({RequestState.DECODING, RequestState.WAITING, RequestState.ENDED}),
    RequestState.RECEIVING: frozenset({RequestState.DECODING, RequestState.ENDED}),
    RequestState.ENDED: frozenset(),
}


class LocalRequest:
    """Mutable bookkeeping of one request on one instance.

    ``num_output_tokens`` counts tokens that came back *before* the current (re)start; while it
    decodes, the count is a function of the instance's step clock: see `DecodeGroup`.
    """

    __slots__ = (
        "base_computed",
        "base_output",
        "blocks",
        "failed_steps",
        "finish_clock",
        "hand_over",
        "is_stoppable",
        "join_clock",
        "max_output_tokens",
        "num_computed_tokens",
        "num_output_tokens",
        "num_returned_tokens",
        "num_transfers",
        "output_token_ids",
        "prefill_announced",
        "prefill_target",
        "request_id",
        "sequence",
        "spec",
        "state",
    )

    def __init__(self, spec: RequestSpec, *, hand_over: bool, num_output_tokens: int) -> None:
        self.spec = spec
        self.request_id = spec.request_id
        self.max_output_tokens = spec.max_output_tokens
        self.is_stoppable = bool(spec.stop_token_ids)  # a token may end it before its last
        self.state = RequestState.WAITING
        self.hand_over = hand_over
        self.num_output_tokens = num_output_tokens
        self.output_token_ids: list[int] | None = None
        self.blocks: RequestBlocks | None = None
        self.sequence = 0  # order of admission; the newest is preempted first
        self.failed_steps = 0
        self.num_computed_tokens = 0  # planned, while prefilling
        self.num_returned_tokens = 0  # computed by steps that came back, while prefilling
        self.prefill_target = spec.num_prompt_tokens + num_output_tokens
        self.num_transfers = 0  # transfers that read its blocks
        self.prefill_announced = False
        self.base_computed = 0
        self.base_output = 0
        self.join_clock = 0
        self.finish_clock = 0

    @property
    def waits_for_hand_over(self) -> bool:
        """True where it is prefilled and its KV has yet to leave."""
        return self.state is RequestState.HANDING_OVER and self.hand_over

    def move(self, state: RequestState) -> None:
        """The one funnel for a change of state."""
        assert state in REQUEST_TRANSITIONS[self.state], f"{self.request_id}: {self.state} -> {state}"
        self.state = state

    def restart(self, num_output_tokens: int) -> None:
        """Begin again with nothing computed: the prompt and the tokens so far are the new prefill."""
        self.num_output_tokens = num_output_tokens
        self.prefill_target = self.spec.num_prompt_tokens + num_output_tokens
        self.num_computed_tokens = 0
        self.num_returned_tokens = 0
