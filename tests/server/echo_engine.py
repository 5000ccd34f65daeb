"""An engine that answers every prompt with the prompt, over and over: what comes out is known beforehand."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from sagellm.core.config import Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.step_executor import TokenLogprobs
from sagellm.server.engine import InstanceSnapshot, InstanceStatus, OutputDelta, Refusal, RequestOutcome


@dataclass
class EchoEngine:
    """An `Engine`. The switches say what is to happen to requests from then on."""

    tokens_per_delta: int = 1
    pause_s: float = 0.0  # before each delta
    num_cached_tokens: int = 0
    queue_max: int = 1000
    ends_after: int | None = None  # tokens after which `outcome` ends a request
    outcome: RequestOutcome = field(default_factory=lambda: RequestOutcome(FinishReason.ERROR, "made to fail"))
    breaks_after: int | None = None  # tokens after which a request meets an error that nobody expected
    is_alive: bool = True
    is_draining: bool = False
    seen: list[RequestSpec] = field(default_factory=list)
    cancelled: list[tuple[RequestId, FinishReason]] = field(default_factory=list)
    running: dict[RequestId, asyncio.Event] = field(default_factory=dict)
    num_given: int = 0  # tokens that readers took

    @property
    def num_unfinished(self) -> int:
        return len(self.running)

    @property
    def num_queued(self) -> int:
        return 0

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def submit(self, request: RequestSpec) -> AsyncIterator[OutputDelta | RequestOutcome]:
        assert request.request_id not in self.running
        self.seen.append(request)
        if len(self.running) >= self.queue_max:
            return self._reject(f"the queue is full ({self.queue_max} requests)")
        self.running[request.request_id] = asyncio.Event()
        return self._serve(request, self.breaks_after)

    def cancel(self, request_id: RequestId, reason: FinishReason = FinishReason.ABORT) -> None:
        stop = self.running.pop(request_id, None)
        if stop is not None:
            self.cancelled.append((request_id, reason))
            stop.set()

    def snapshots(self) -> tuple[InstanceSnapshot, ...]:
        instance_id = InstanceId("echo-0")
        status = InstanceStatus(instance_id, len(self.running), 0, 7, 11, 13, 17, 19, 23, 5, 1_000_000)
        return (InstanceSnapshot(instance_id, Role.MIXED, "echo", 64, 16, 8, not self.is_alive, status),)

    async def drain(self, grace_s: float) -> None:
        self.is_draining = True

    async def _reject(self, reason: str) -> AsyncIterator[OutputDelta | RequestOutcome]:
        yield RequestOutcome(None, reason, Refusal.QUEUE_FULL)

    async def _serve(
        self, request: RequestSpec, breaks_after: int | None
    ) -> AsyncIterator[OutputDelta | RequestOutcome]:
        stop, prompt = self.running[request.request_id], request.prompt_token_ids
        assert prompt is not None
        num_output, outcome = 0, RequestOutcome(FinishReason.LENGTH)
        while num_output < request.max_output_tokens:
            if self.ends_after is not None and num_output >= self.ends_after:
                outcome = self.outcome
                break
            if breaks_after is not None and num_output >= breaks_after:
                raise ArithmeticError("made to break")
            if await self._is_stopped(stop):
                outcome = RequestOutcome(FinishReason.ABORT)
                break
            count = min(self.tokens_per_delta, request.max_output_tokens - num_output)
            ids = tuple(prompt[(num_output + index) % len(prompt)] for index in range(count))
            ends = [index for index, token_id in enumerate(ids) if token_id in request.stop_token_ids]
            if ends:
                ids = ids[: ends[0] + 1]
            num_output += len(ids)
            self.num_given += len(ids)
            yield OutputDelta(ids, self._logprobs(request, ids), self.num_cached_tokens)
            if ends:
                outcome = RequestOutcome(FinishReason.STOP)
                break
        self.running.pop(request.request_id, None)
        yield outcome

    async def _is_stopped(self, stop: asyncio.Event) -> bool:
        if not self.pause_s:
            await asyncio.sleep(0)
            return stop.is_set()
        try:
            await asyncio.wait_for(stop.wait(), self.pause_s)
        except TimeoutError:
            return False
        return True

    def _logprobs(self, request: RequestSpec, ids: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
        """The drawn token at -0.5; then the id itself, the next one and so on, ever less likely."""
        assert request.sampling is not None
        wanted = request.sampling.num_logprobs
        if wanted is None:
            return ()
        return tuple(
            TokenLogprobs(
                (each, *((each + step) % 256 for step in range(wanted))),
                (-0.5, *(-0.5 - step for step in range(wanted - 1)), *([float("-inf")] if wanted else [])),
                (1, *range(1, wanted + 1)),
            )
            for each in ids
        )
