"""What runs the steps of one instance: the seam between a driver and a device.

A driver tells the executor of requests as it hands their messages to the machine, launches steps as
the machine asks for them, and gets each one's report. The executor keeps for itself what a plan leaves
out: the tokens of each request, block tables, and where each sequence stands.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from sagellm.core.identity import BlockId, RequestId
from sagellm.core.messages import RunStep, StepFailed, StepFinished
from sagellm.core.request import RequestSpec


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The log-probabilities at one output token, the drawn token first, then the most likely ones in order.

    ``ranks[i]`` is 1 for the most likely token of all. Natural logarithms, of the distribution before
    temperature and cut-offs.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]


class StepOutcome(msgspec.Struct, frozen=True, gc=False):
    """A step came back: what the machine is told, and what only clients want to know."""

    event: StepFinished | StepFailed
    logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {}  # of requests that asked, one for each repetition


class StepExecutor(Protocol):
    """One instance's device, whatever it is.

    Calls come from one thread. Steps run in the order of their launch, at most two at a time, and each
    is reported exactly once, in that order, through the callback that the executor was made with, from
    any thread. An executor that cannot go on at all (a sticky device error) calls ``on_dead`` once.
    """

    def start(self, on_outcome: Callable[[StepOutcome], None], on_dead: Callable[[str], None]) -> None:
        """Get ready to run: load weights, take memory. Returns when steps can be launched."""

    def add_request(self, request: RequestSpec, output_token_ids: tuple[int, ...]) -> None:
        """A request that may occur in plans from now on, with the output that it has already.

        Told again of a request that it knows (its KV has arrived, with its output so far), it takes the
        longer output.
        """

    def remove_request(self, request_id: RequestId) -> None:
        """No further step will name the request; steps launched before may still."""

    def launch(self, step: RunStep) -> None:
        """Run the plan once (``repeat_max`` is 1). Returns at once."""

    def read_blocks(self, block_ids: tuple[BlockId, ...]) -> bytes:
        """The KV of these blocks, once every step launched so far that writes to them is over."""

    def write_blocks(self, block_ids: tuple[BlockId, ...], data: bytes) -> None:
        """Fill these blocks with what ``read_blocks`` of an equal instance gave, before any later step.

        Raises ValueError where ``data`` has not the size of so many blocks.
        """

    def close(self) -> None:
        """Give all memory back. Steps under way need not be reported any more."""
