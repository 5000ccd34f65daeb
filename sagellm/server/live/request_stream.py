"""One request as the front keeps it: what came out so far, and who reads it."""

from asyncio import AbstractEventLoop, Future

from sagellm.core.identity import InstanceId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.step_executor import TokenLogprobs
from sagellm.server.engine import OutputDelta, RequestOutcome


class RequestStream:
    """An asynchronous iterator over a request's output; ends with its `RequestOutcome`.

    Tokens wait here until they are read, so a reader that is slow holds nobody up, and gets all that
    came meanwhile at once.
    """

    __slots__ = (
        "_is_read_out",
        "_logprobs",
        "_loop",
        "_num_read",
        "_outcome",
        "_waiter",
        "cancelled",
        "num_cached_tokens",
        "output_token_ids",
        "request",
        "told",
        "turn",
    )

    def __init__(self, request: RequestSpec, loop: AbstractEventLoop, turn: int) -> None:
        self.request = request
        self.turn = turn  # of the front, in which the control plane hears of it
        self.output_token_ids: list[int] = []  # all that was emitted
        self.num_cached_tokens: int | None = None  # None: no instance has said
        self.cancelled: FinishReason | None = None
        self.told: dict[InstanceId, None] = {}  # instances that were ever given the request
        self._loop = loop
        self._num_read = 0
        self._logprobs: list[TokenLogprobs] = []  # of tokens not read
        self._outcome: RequestOutcome | None = None
        self._is_read_out = False
        self._waiter: Future[None] | None = None

    # --- the front's side ------------------------------------------------------------------------------

    def push(self, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> None:
        """The request got these tokens. Who waits for them is to be told, by `wake`, when others can wait no more."""
        self.output_token_ids.extend(token_ids)
        if logprobs:
            self._logprobs.extend(logprobs[: len(token_ids)])

    def end(self, outcome: RequestOutcome) -> None:
        """Its one end."""
        assert self._outcome is None, f"I3: {self.request.request_id} ended twice"
        self._outcome = outcome
        self.wake()

    def wake(self) -> bool:
        """Let the reader go on; False: it did not wait."""
        waiter, self._waiter = self._waiter, None
        if waiter is None or waiter.done():
            return False
        waiter.set_result(None)
        return True

    # --- the reader's side -----------------------------------------------------------------------------

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> OutputDelta | RequestOutcome:
        while self._num_read == len(self.output_token_ids):
            if self._outcome is not None:
                return self._read_outcome(self._outcome)
            self._waiter = self._loop.create_future()
            await self._waiter
        token_ids = tuple(self.output_token_ids[self._num_read :])
        logprobs, self._logprobs = tuple(self._logprobs), []
        self._num_read += len(token_ids)
        return OutputDelta(token_ids, logprobs, self.num_cached_tokens or 0)

    def _read_outcome(self, outcome: RequestOutcome) -> RequestOutcome:
        if self._is_read_out:
            raise StopAsyncIteration
        self._is_read_out = True
        return outcome
