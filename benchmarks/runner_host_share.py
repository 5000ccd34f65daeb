"""The host's share of a step in the model runner: what it takes beside the model, with 256 decodes.

    python benchmarks/runner_host_share.py [--backend cpu] [--steps N] [--vocab-size N] [--json FILE]

The program gives the same logits at once, so what is left is the bookkeeping of requests, the packed copy,
the inputs, the launches of the sampler, and the outcome. On an accelerator only launches are timed, the replay of
a device graph among them where it has them, and the device is waited for between steps; on the CPU the sampler's
work is in the time, so its vocabulary is small. On a busy machine the fastest quarter says more than the median.

*launch* is what the launching thread does, *report* what the reporting one does once the device is done: it makes
Python's objects of what came back. All kinds of sampling are timed in one run.
"""

import argparse
import gc
import json
import statistics
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from time import perf_counter_ns

import torch

from backends.base import HardwareBackend
from backends.model_runner.kv_blocks import KVBlocks
from backends.model_runner.loaded_model import LoadedModel
from backends.model_runner.step_runner import StepMemory, StepRunner
from backends.registry import get_backend
from backends.step_inputs import KVTensors, StepInputs
from sagellm.core.identity import BlockId, RequestId
from sagellm.core.plan import StepPlan, TokenChunk
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import GREEDY, SamplingParameters

NUM_DECODES = 256
BLOCK_SIZE = 16
PROMPT_TOKENS = 100
NUM_BLOCKS_EACH = 16
TARGET_US = 300

_KINDS = {
    "greedy": GREEDY,
    "temperature": SamplingParameters(temperature=0.8),
    "top_k 20, top_p 0.8": SamplingParameters(temperature=0.7, top_k=20, top_p=0.8),
    "top_p 0.95": SamplingParameters(top_p=0.95),
    "min_p 0.05": SamplingParameters(min_p=0.05),
    "repetition penalty": SamplingParameters(temperature=0.7, repetition_penalty=1.05),
    "all penalties": SamplingParameters(repetition_penalty=1.05, presence_penalty=0.5, frequency_penalty=0.2),
    "5 logprobs": SamplingParameters(temperature=0.0, num_logprobs=5),
    "20 logprobs": SamplingParameters(temperature=0.0, num_logprobs=20),
}
CASES = {**{name: (sampling,) for name, sampling in _KINDS.items()}, "each another of these": tuple(_KINDS.values())}


@dataclass(frozen=True, slots=True)
class HostTime:
    """Of one step, in nanoseconds."""

    launch_ns: int
    report_ns: int

    @property
    def both_us(self) -> float:
        return (self.launch_ns + self.report_ns) / 1000


@dataclass(frozen=True, slots=True)
class IdleProgram:
    """Logits that were there before."""

    logits: torch.Tensor

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[1]

    def run(self, inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        return self.logits[: inputs.sampled_rows.numel()]


class Bench:
    """A runner with requests that decode, which want ``samplings`` in turn."""

    def __init__(self, backend: HardwareBackend, samplings: tuple[SamplingParameters, ...], vocab_size: int) -> None:
        self._backend = backend
        device = backend.torch_device(0)
        program = IdleProgram(torch.randn(NUM_DECODES, vocab_size, device=device))
        model = LoadedModel(program, 1, 1, 1, torch.float32, num_positions=4096)
        shape = (1, 2, NUM_DECODES * NUM_BLOCKS_EACH, BLOCK_SIZE, 1, 1)
        self._runner = StepRunner(model, KVBlocks(backend, 0, shape, torch.float32), backend, 0)
        self._memory = StepMemory(backend, 0, NUM_DECODES)
        self._ids = tuple(RequestId(str(index)) for index in range(NUM_DECODES))
        self._num_tokens = [PROMPT_TOKENS + index % BLOCK_SIZE for index in range(NUM_DECODES)]
        self._num_blocks = [0] * NUM_DECODES
        for request_id, num_tokens, sampling in zip(self._ids, self._num_tokens, cycle(samplings), strict=False):
            self._runner.requests.add(
                RequestSpec(request_id, 0, num_tokens, 3000, prompt_token_ids=(1,) * num_tokens, sampling=sampling), ()
            )
        chunks = tuple(
            TokenChunk(request_id, num_tokens, 0, True)
            for request_id, num_tokens in zip(self._ids, self._num_tokens, strict=True)
        )
        self._run(StepPlan((), 0, chunks, self._new_blocks()))
        if backend.capabilities(0).graph_capture:
            self._runner.decode_graphs.capture(NUM_DECODES, sys.stderr)

    def step(self) -> HostTime:
        """What one more decode step takes the host."""
        plan = StepPlan(self._ids, sum(self._num_tokens), (), self._new_blocks())
        return self._run(plan)

    def _new_blocks(self) -> tuple[tuple[RequestId, tuple[BlockId, ...]], ...]:
        """Those that a step needs in which every request has ``_num_tokens``; then each has one more."""
        new = []
        for index, request_id in enumerate(self._ids):
            needed = -(-self._num_tokens[index] // BLOCK_SIZE)
            first = index * NUM_BLOCKS_EACH
            ids = tuple(BlockId(first + block) for block in range(self._num_blocks[index], needed))
            if ids:
                new.append((request_id, ids))
            self._num_blocks[index] = needed
            self._num_tokens[index] += 1
        return tuple(new)

    def _run(self, plan: StepPlan) -> HostTime:
        begin_ns = perf_counter_ns()
        tokens = self._runner.run(plan, self._memory)
        launched_ns = perf_counter_ns()
        self._backend.synchronize(0)
        waited_ns = perf_counter_ns()
        told = tokens.token_ids(), tokens.token_logprobs()
        end_ns = perf_counter_ns()
        assert len(told[0]) == plan.num_seqs
        return HostTime(launched_ns - begin_ns, end_ns - waited_ns)


def measure(
    backend: HardwareBackend, samplings: tuple[SamplingParameters, ...], vocab_size: int, num_steps: int
) -> list[HostTime]:
    """Of each step."""
    with torch.inference_mode():
        bench = Bench(backend, samplings, vocab_size)
        for _ in range(5):
            bench.step()
        gc.collect()
        return [bench.step() for _ in range(num_steps)]


def summary(times: list[HostTime]) -> dict[str, float]:
    both_us = sorted(time.both_us for time in times)
    return {
        "min_us": both_us[0],
        "p25_us": both_us[len(both_us) // 4],
        "median_us": statistics.median(both_us),
        "launch_median_us": statistics.median(time.launch_ns / 1000 for time in times),
        "report_median_us": statistics.median(time.report_ns / 1000 for time in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="the host's share of a step of 256 decodes")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--vocab-size", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backend = get_backend(arguments.backend)
    print(f"{backend.get_device_info(0).name}; {NUM_DECODES} decodes; target {TARGET_US} us a step, median")
    print(f"{'us':24}{'min':>9}{'p25':>9}{'median':>9}{'launch':>9}{'report':>9}")
    results = {}
    for name, samplings in CASES.items():
        row = summary(measure(backend, samplings, arguments.vocab_size, arguments.steps))
        results[name] = row
        print(f"{name:24}" + "".join(f"{value:9.0f}" for value in row.values()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
