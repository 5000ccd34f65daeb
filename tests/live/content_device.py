"""A device of which the KV cache is real: what a step gives depends on what its block tables hold.

The "KV" of a token is the token itself. So a wrong block, one that is reused too early, one that never
arrived or arrived too late, a wrong order or a step that counts although it failed gives a wrong token.
"""

import queue
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from random import Random
from zlib import crc32

from backends.executor_settings import ExecutorSettings
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.messages import RunStep, StepFailed, StepFinished
from sagellm.core.plan import StepPlan
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.step_executor import StepOutcome, TokenLogprobs

GARBAGE = -1
VOCAB_SIZE = 50


def next_token(context: Sequence[int]) -> int:
    """The model: any function of the whole context will do."""
    return crc32(repr(list(context)).encode()) % VOCAB_SIZE


def undisturbed(request: RequestSpec) -> tuple[list[int], FinishReason]:
    """What one device with endless memory and no faults makes of the request."""
    tokens = list(request.prompt_token_ids or ())
    output: list[int] = []
    while len(output) < request.max_output_tokens:
        output.append(next_token(tokens + output))
        if output[-1] in request.stop_token_ids:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


@dataclass(frozen=True)
class DeviceFaults:
    """What goes wrong on one device, and how long its steps take."""

    failed_share: float = 0.0  # of steps
    invalid_share: float = 0.0  # of drawn tokens: their logits are not finite
    step_s_max: float = 0.001
    num_steps_max: int | None = None  # it dies for good at this one


@dataclass
class _Known:
    spec: RequestSpec
    tokens: list[int]
    table: list[BlockId] = field(default_factory=list)


class ContentDevice:
    """A `StepExecutor`. All that it is told it does in order, on a thread of its own."""

    def __init__(self, settings: ExecutorSettings, faults: DeviceFaults, seed: int) -> None:
        config = settings.instance
        self._faults = faults
        self._random = Random(seed)
        self._block_size = config.block_size
        self._blocks = [array("i", [GARBAGE] * config.block_size) for _ in range(config.num_blocks)]
        self._num_steps_left = faults.num_steps_max
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_commands, name="content device", daemon=True)
        self.requests: dict[RequestId, _Known] = {}

    def start(self, on_outcome: Callable[[StepOutcome], None], on_dead: Callable[[str], None]) -> None:
        self._on_outcome, self._on_dead = on_outcome, on_dead
        self._thread.start()

    def close(self) -> None:
        self._commands.put(None)
        self._thread.join()

    def add_request(self, request: RequestSpec, output_token_ids: tuple[int, ...]) -> None:
        self._commands.put(lambda: self._add(request, output_token_ids))

    def remove_request(self, request_id: RequestId) -> None:
        self._commands.put(lambda: self.requests.__delitem__(request_id))

    def launch(self, step: RunStep) -> None:
        self._commands.put(lambda: self._run_step(step))

    def read_blocks(self, block_ids: tuple[BlockId, ...]) -> bytes:
        answer: Future[bytes] = Future()
        self._commands.put(lambda: answer.set_result(b"".join(self._blocks[each].tobytes() for each in block_ids)))
        return answer.result(10)

    def write_blocks(self, block_ids: tuple[BlockId, ...], data: bytes) -> None:
        size = 4 * self._block_size
        assert len(data) == size * len(block_ids)
        self._commands.put(lambda: self._write(block_ids, data, size))

    # --- the device's thread ---------------------------------------------------------------------------

    def _run_commands(self) -> None:
        while (command := self._commands.get()) is not None:
            command()

    def _add(self, request: RequestSpec, output_token_ids: tuple[int, ...]) -> None:
        known = self.requests.get(request.request_id)
        tokens = [*(request.prompt_token_ids or ()), *output_token_ids]
        if known is None:
            self.requests[request.request_id] = _Known(request, tokens)
        elif len(tokens) > len(known.tokens):
            known.tokens = tokens

    def _write(self, block_ids: tuple[BlockId, ...], data: bytes, size: int) -> None:
        for index, block_id in enumerate(block_ids):
            self._blocks[block_id] = array("i", data[index * size : (index + 1) * size])

    def _run_step(self, step: RunStep) -> None:
        if self._num_steps_left is not None:
            self._num_steps_left -= 1
            if self._num_steps_left <= 0:
                if self._num_steps_left == 0:
                    self._on_dead("it fell off the bus")
                return
        self._change_tables(step.plan)
        time.sleep(self._random.uniform(0, self._faults.step_s_max))
        if self._random.random() < self._faults.failed_share:
            self._spoil(step.plan)
            self._on_outcome(StepOutcome(StepFailed(step.instance_id, step.step_id, "on purpose")))
            return
        drawn = self._computed(step.plan)
        invalid_ids = tuple(
            known.spec.request_id for known, _ in drawn if self._random.random() < self._faults.invalid_share
        )
        token_ids = tuple((token,) for _, token in drawn)
        event = StepFinished(step.instance_id, step.step_id, (time.monotonic_ns(),), token_ids, invalid_ids)
        logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {
            known.spec.request_id: (TokenLogprobs((token,), (0.0,), (1,)),)
            for known, token in drawn
            if known.spec.sampling is not None and known.spec.sampling.num_logprobs is not None
        }
        self._on_outcome(StepOutcome(event, logprobs))

    def _change_tables(self, plan: StepPlan) -> None:
        for request_id in plan.preempted_request_ids:
            if request_id in self.requests:
                self.requests[request_id].table.clear()
        for request_id, block_ids in plan.new_block_ids:
            if request_id in self.requests:
                self.requests[request_id].table.extend(block_ids)

    def _computed(self, plan: StepPlan) -> list[tuple[_Known, int]]:
        """Every sampled request and its token. All is written before anything is read."""
        sampled: list[tuple[_Known, int]] = []  # the request, and the length of its context
        for request_id in plan.decode_request_ids:
            known = self.requests[request_id]
            self._put(known, len(known.tokens) - 1, len(known.tokens))
            sampled.append((known, len(known.tokens)))
        for chunk in plan.chunks:
            known = self.requests[chunk.request_id]
            end = chunk.num_computed_tokens + chunk.num_tokens
            assert end <= len(known.tokens), "a chunk of tokens that nobody knows"
            self._put(known, chunk.num_computed_tokens, end)
            if chunk.samples:
                sampled.append((known, end))
        drawn = [(known, next_token([self._slot(known, at) for at in range(end)])) for known, end in sampled]
        for (known, token), (_, end) in zip(drawn, sampled, strict=True):
            known.tokens[end:] = [token]
        return drawn

    def _spoil(self, plan: StepPlan) -> None:
        for request_id in plan.decode_request_ids:
            known = self.requests[request_id]
            self._blocks[known.table[(len(known.tokens) - 1) // self._block_size]][-1] = GARBAGE
        for chunk in plan.chunks:
            table = self.requests[chunk.request_id].table
            for at in range(chunk.num_computed_tokens, chunk.num_computed_tokens + chunk.num_tokens):
                self._blocks[table[at // self._block_size]][at % self._block_size] = GARBAGE

    def _put(self, known: _Known, start: int, end: int) -> None:
        for at in range(start, end):
            self._blocks[known.table[at // self._block_size]][at % self._block_size] = known.tokens[at]

    def _slot(self, known: _Known, at: int) -> int:
        return self._blocks[known.table[at // self._block_size]][at % self._block_size]
