"""Tokens per second of small models with random weights on the CPU, prefill and decode apart.

    python benchmarks/cpu_runner.py [--models NAME ...] [--batches N ...] [--threads N] [--steps N] [--json FILE]

Plans go straight to the executor, two in flight, without a scheduler: this is the model runner alone. Prompts
have 512 tokens, and a prefill step takes one of them. Wall times mean little on a busy machine; the load
average is printed beside them.
"""

import argparse
import json
import os
import queue
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from backends.executor_settings import ExecutorSettings
from backends.model_runner.torch_executor import TorchStepExecutor
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import BlockId, InstanceId, RequestId, StepId
from sagellm.core.messages import RunStep, StepFinished
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.request import RequestSpec
from sagellm.core.step_executor import StepOutcome

INSTANCE_ID = InstanceId("cpu-0")
MODELS = ("sagellm/toy", "sagellm/qwen3-100m")
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 512
BLOCK_SIZE = 16
OUTPUT_TOKENS_MAX = 512


@dataclass(frozen=True, slots=True)
class Speed:
    """One model at one batch size."""

    model: str
    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_step_ms: float


class Bench:
    """An executor with a batch of requests, told plans by hand."""

    def __init__(self, model: str, batch: int, num_threads: int) -> None:
        self._num_blocks_each = (PROMPT_TOKENS + OUTPUT_TOKENS_MAX) // BLOCK_SIZE
        instance = InstanceConfig(INSTANCE_ID, batch * self._num_blocks_each, block_size=BLOCK_SIZE, max_num_seqs=batch)
        settings = ExecutorSettings(
            instance=instance, model=model, backend="cpu", load_format="dummy", num_threads=num_threads
        )
        self.executor = TorchStepExecutor(settings)
        self._outcomes: queue.SimpleQueue[StepOutcome] = queue.SimpleQueue()
        self._room = threading.Semaphore(2)
        self.executor.start(self._back, sys.exit)
        self._ids = tuple(RequestId(str(index)) for index in range(batch))
        self._num_launched = 0

    def prefill_s(self) -> float:
        """Seconds to prefill every prompt, one in each step."""
        for index, request_id in enumerate(self._ids):
            prompt = tuple((7 * index + 31 * position) % 256 for position in range(PROMPT_TOKENS))
            spec = RequestSpec(request_id, 0, PROMPT_TOKENS, OUTPUT_TOKENS_MAX, prompt_token_ids=prompt)
            self.executor.add_request(spec, ())
        begin = perf_counter()
        for index, request_id in enumerate(self._ids):
            first = index * self._num_blocks_each
            block_ids = tuple(map(BlockId, range(first, first + self._num_blocks_each)))
            self._launch(StepPlan((), 0, (TokenChunk(request_id, PROMPT_TOKENS, 0, True),), ((request_id, block_ids),)))
        self._wait(len(self._ids))
        return perf_counter() - begin

    def decode_s(self, num_steps: int) -> float:
        """Seconds to decode so many tokens of every request."""
        begin = perf_counter()
        for _ in range(num_steps):
            self._launch(StepPlan(self._ids, 0, (), ()))
        self._wait(num_steps)
        return perf_counter() - begin

    def _launch(self, plan: StepPlan) -> None:
        self._room.acquire()
        self.executor.launch(RunStep(INSTANCE_ID, StepId(self._num_launched), plan))
        self._num_launched += 1

    def _back(self, outcome: StepOutcome) -> None:
        self._outcomes.put(outcome)
        self._room.release()

    def _wait(self, num_steps: int) -> None:
        for _ in range(num_steps):
            event = self._outcomes.get().event
            if not isinstance(event, StepFinished):
                raise SystemExit(f"a step failed: {event.reason}")


def measure(model: str, batch: int, num_steps: int, num_threads: int) -> Speed:
    """The speed of one model at one batch size."""
    bench = Bench(model, batch, num_threads)
    try:
        prefill_s = bench.prefill_s()
        bench.decode_s(2)
        decode_s = bench.decode_s(num_steps)
    finally:
        bench.executor.close()
    return Speed(
        model, batch, batch * PROMPT_TOKENS / prefill_s, batch * num_steps / decode_s, 1000 * decode_s / num_steps
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="tokens per second of small models on the CPU")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch likes")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for model in arguments.models:
        for batch in arguments.batches:
            speed = measure(model, batch, arguments.steps, arguments.threads)
            results.append(asdict(speed))
            print(
                f"{model:20} batch {batch:3}: prefill {speed.prefill_tokens_per_s:8.0f} tokens/s, decode "
                f"{speed.decode_tokens_per_s:8.0f} tokens/s, {speed.decode_step_ms:7.2f} ms a step; "
                f"load average {os.getloadavg()[0]:.1f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
