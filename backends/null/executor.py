"""An executor without a device: made-up tokens, for measuring what surrounds one, and for tests."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from backends.executor_settings import ExecutorSettings
from backends.model_runner.executor_error import ExecutorError
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.messages import RunStep, StepFinished
from sagellm.core.plan import StepPlan
from sagellm.core.request import RequestSpec
from sagellm.core.step_executor import StepOutcome, TokenLogprobs

_FIRST_TOKEN_ID = ord("a")
_NUM_TOKEN_IDS = 26
_TOKENS = tuple((_FIRST_TOKEN_ID + index,) for index in range(_NUM_TOKEN_IDS))


def made_up_token_id(output_position: int) -> int:
    """What every request gets as its output token of this index: the letters from a to z, in a circle."""
    return _TOKENS[output_position % _NUM_TOKEN_IDS][0]


@dataclass(slots=True)
class _NullRequest:
    num_prompt_tokens: int
    num_output_tokens: int
    num_logprobs: int | None


class NullExecutor:
    """Tokens without a model.

    A token depends on nothing but its position in the output, so a request gets the same ones whatever
    happens to it on the way. Without ``step_duration_ns`` a step is over before `launch` returns, and is
    reported from the calling thread. With it, steps take so long, one after the other, and are reported from a
    thread of their own. A block's KV is a single byte.
    """

    def __init__(self, settings: ExecutorSettings, step_duration_ns: Callable[[StepPlan], int] | None = None) -> None:
        self._settings = settings
        self._step_duration_ns = step_duration_ns
        self._requests: dict[RequestId, _NullRequest] = {}
        self._num_asking_logprobs = 0
        self._on_outcome: Callable[[StepOutcome], None] | None = None
        self._due: queue.SimpleQueue[tuple[int, StepOutcome] | None] = queue.SimpleQueue()
        self._device_free_ns = 0
        self._reporter: threading.Thread | None = None

    def start(self, on_outcome: Callable[[StepOutcome], None], on_dead: Callable[[str], None]) -> None:
        """See `StepExecutor`. ``on_dead`` is never called."""
        self._on_outcome = on_outcome
        if self._step_duration_ns is not None:
            self._reporter = threading.Thread(target=self._report_when_due, name="null-executor", daemon=True)
            self._reporter.start()

    def add_request(self, request: RequestSpec, output_token_ids: tuple[int, ...]) -> None:
        """See `StepExecutor`."""
        known = self._requests.get(request.request_id)
        if known is not None:
            known.num_output_tokens = max(known.num_output_tokens, len(output_token_ids))
            return
        num_logprobs = None if request.sampling is None else request.sampling.num_logprobs
        self._num_asking_logprobs += num_logprobs is not None
        self._requests[request.request_id] = _NullRequest(
            request.num_prompt_tokens, len(output_token_ids), num_logprobs
        )

    def remove_request(self, request_id: RequestId) -> None:
        """See `StepExecutor`."""
        known = self._requests.pop(request_id, None)
        if known is not None:
            self._num_asking_logprobs -= known.num_logprobs is not None

    def launch(self, step: RunStep) -> None:
        """See `StepExecutor`. Raises ExecutorError where the plan names an unknown request, or before `start`."""
        if self._on_outcome is None:
            raise ExecutorError(f"step {step.step_id}: the executor was not started; call start first")
        launched_ns = time.monotonic_ns()
        token_ids, logprobs = self._made_up_outputs(step.plan)
        if self._step_duration_ns is None:
            self._on_outcome(StepOutcome(_finished(step, launched_ns, token_ids), logprobs))
            return
        self._device_free_ns = max(self._device_free_ns, launched_ns) + self._step_duration_ns(step.plan)
        outcome = StepOutcome(_finished(step, self._device_free_ns, token_ids), logprobs)
        self._due.put((self._device_free_ns, outcome))

    def read_blocks(self, block_ids: tuple[BlockId, ...]) -> bytes:
        """See `StepExecutor`."""
        return bytes(len(block_ids))

    def write_blocks(self, block_ids: tuple[BlockId, ...], data: bytes) -> None:
        """See `StepExecutor`."""
        if len(data) != len(block_ids):
            raise ExecutorError(f"data: {len(data)} bytes, must be {len(block_ids)}, one for each block")

    def close(self) -> None:
        """See `StepExecutor`."""
        self._requests.clear()
        if self._reporter is not None:
            self._due.put(None)
            self._reporter.join()
            self._reporter = None
        self._on_outcome = None

    def _made_up_outputs(
        self, plan: StepPlan
    ) -> tuple[tuple[tuple[int, ...], ...], dict[RequestId, tuple[TokenLogprobs, ...]]]:
        """Each sampled request's token, in the plan's order, and the log-probabilities that were asked for."""
        requests = self._requests
        for chunk in plan.chunks:
            if chunk.samples:
                request = self._known(chunk.request_id)
                end = chunk.num_computed_tokens + chunk.num_tokens
                request.num_output_tokens = end - request.num_prompt_tokens
        token_ids = []
        sampled_ids = plan.sampled_request_ids
        try:
            for request_id in sampled_ids:
                request = requests[request_id]
                token_ids.append(_TOKENS[request.num_output_tokens % _NUM_TOKEN_IDS])
                request.num_output_tokens += 1
        except KeyError as error:
            raise ExecutorError(f"request {error.args[0]}: in a plan, but not known; call add_request first") from error
        if not self._num_asking_logprobs:
            return tuple(token_ids), {}
        return tuple(token_ids), self._made_up_logprobs(sampled_ids, token_ids)

    def _made_up_logprobs(
        self, request_ids: tuple[RequestId, ...], token_ids: list[tuple[int]]
    ) -> dict[RequestId, tuple[TokenLogprobs, ...]]:
        logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        for request_id, (token_id,) in zip(request_ids, token_ids, strict=True):
            num_logprobs = self._requests[request_id].num_logprobs
            if num_logprobs is not None:
                ids = (token_id, *(_TOKENS[index % _NUM_TOKEN_IDS][0] for index in range(num_logprobs)))
                ranks = (1, *range(1, num_logprobs + 1))
                logprobs[request_id] = (TokenLogprobs(ids, tuple(-0.5 * rank for rank in ranks), ranks),)
        return logprobs

    def _known(self, request_id: RequestId) -> _NullRequest:
        request = self._requests.get(request_id)
        if request is None:
            raise ExecutorError(f"request {request_id}: in a plan, but not known; call add_request first")
        return request

    def _report_when_due(self) -> None:
        on_outcome = self._on_outcome
        assert on_outcome is not None
        while (item := self._due.get()) is not None:
            due_ns, outcome = item
            wait_ns = due_ns - time.monotonic_ns()
            if wait_ns > 0:
                time.sleep(wait_ns / 1_000_000_000)
            on_outcome(outcome)


def _finished(step: RunStep, end_ns: int, token_ids: tuple[tuple[int, ...], ...]) -> StepFinished:
    return StepFinished(step.instance_id, step.step_id, (end_ns,), token_ids)
