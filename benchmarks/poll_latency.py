"""How long one `Instance.poll` takes with 256 running requests.

    python benchmarks/poll_latency.py [--polls N] [--json FILE]

Three kinds of poll, each of an instance with two steps in flight and blocks of 16 tokens, where each
step grows the tables of a sixteenth of the requests:

* a decode step is planned, and nothing has come back;
* a step is back: its 256 tokens go out and the next decode step is planned. Once with symbolic tokens,
  as in simulation, and once with token ids, each looked at for stop tokens, as on a device;
* the same, and a request waits: its prompt of 1,024 token ids is looked up in the prefix index,
  admitted, and prefilled in the step that is planned.

The garbage collector stays on, as it is in a server.
"""

import argparse
import json
import statistics
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import AssignRequest, InstanceEffect, RunStep, StepFinished, StepProgressed
from sagellm.core.request import RequestSpec
from sagellm.runtime.instance import Instance

INSTANCE_ID = InstanceId("mixed-0")
NUM_RUNNING = 256
NUM_PLACES = NUM_RUNNING + 8  # so that one more can be prefilled beside them
NUM_BLOCKS = 128_511  # what an H200 has beside a 7B model
PROMPT_TOKENS = 1_024
OUTPUT_TOKENS = 16_384  # what a client that gives no limit may get
STEP_NS = 10_000_000
STOP_TOKEN_ID = 7
TARGET_US = 200


class Bench:
    """An instance with `NUM_RUNNING` requests that decode, and a device that answers at once."""

    def __init__(self, *, repeat_max: int = 1, stop_token_ids: tuple[int, ...] = ()) -> None:
        self.instance = Instance(
            InstanceConfig(INSTANCE_ID, NUM_BLOCKS, max_num_seqs=NUM_PLACES, repeat_max=repeat_max)
        )
        self.now_ns = 0
        self.in_flight: deque[RunStep] = deque()
        self.durations_ns: list[int] = []
        self._num_prompts = 0
        for index in range(NUM_RUNNING):
            # Lengths differ, so that requests do not all need their next block in the same step.
            self._assign(
                RequestSpec(RequestId(f"running-{index}"), 0, 100 + index, OUTPUT_TOKENS, stop_token_ids=stop_token_ids)
            )
        self.poll()
        while self.in_flight[0].plan.chunks:
            self.finish_step(with_token_ids=False)
        self.durations_ns.clear()
        assert len(self.in_flight[-1].plan.decode_request_ids) == NUM_RUNNING

    def _assign(self, request: RequestSpec) -> None:
        self.instance.handle(AssignRequest(INSTANCE_ID, request), self.now_ns)

    def poll(self) -> tuple[InstanceEffect, ...]:
        start_ns = perf_counter_ns()
        effects = self.instance.poll(self.now_ns)
        self.durations_ns.append(perf_counter_ns() - start_ns)
        self.in_flight.extend(effect for effect in effects if isinstance(effect, RunStep))
        return effects

    def finish_step(self, *, with_token_ids: bool) -> None:
        """The step in front is back, once run."""
        step = self.in_flight.popleft()
        self.now_ns += STEP_NS
        token_ids = ((1,),) * len(step.plan.sampled_request_ids) if with_token_ids else None
        self.instance.handle(StepFinished(INSTANCE_ID, step.step_id, (self.now_ns,), token_ids), self.now_ns)
        self.poll()

    def new_prompt(self) -> None:
        """One more request, of one output token, so that it is gone when its prompt is computed."""
        self._num_prompts += 1
        first_id = self._num_prompts * PROMPT_TOKENS
        token_ids = tuple(range(first_id, first_id + PROMPT_TOKENS))
        self._assign(
            RequestSpec(RequestId(f"prompt-{self._num_prompts}"), 0, PROMPT_TOKENS, 1, prompt_token_ids=token_ids)
        )


def plan_only(num_polls: int) -> list[int]:
    """A repeated step is told to end with the repetition under way, and another is planned behind it."""
    bench = Bench(repeat_max=InstanceConfig(INSTANCE_ID, NUM_BLOCKS).repeat_max)
    for _ in range(num_polls):
        step = bench.in_flight[-1]
        bench.instance.handle(StepProgressed(INSTANCE_ID, step.step_id, ()), bench.now_ns)
        bench.poll()
        assert bench.in_flight[-1] is not step, "nothing was planned"
        bench.now_ns += STEP_NS
        bench.in_flight.popleft()
        bench.instance.handle(StepFinished(INSTANCE_ID, step.step_id, (bench.now_ns,)), bench.now_ns)
        bench.instance.poll(bench.now_ns)
    return bench.durations_ns


def step_return(num_polls: int) -> list[int]:
    bench = Bench()
    for _ in range(num_polls):
        bench.finish_step(with_token_ids=False)
    return bench.durations_ns


def step_return_with_token_ids(num_polls: int) -> list[int]:
    bench = Bench(stop_token_ids=(STOP_TOKEN_ID,))
    for _ in range(num_polls):
        bench.finish_step(with_token_ids=True)
    return bench.durations_ns


def prefill_chunk(num_polls: int) -> list[int]:
    bench = Bench(stop_token_ids=(STOP_TOKEN_ID,))
    for _ in range(num_polls):
        bench.new_prompt()
        bench.finish_step(with_token_ids=True)
        assert bench.in_flight[-1].plan.chunks, "no prompt was planned"
    return bench.durations_ns


CASES: tuple[tuple[str, Callable[[int], list[int]]], ...] = (
    ("decode step planned", plan_only),
    ("step back, decode step planned", step_return),
    ("the same with token ids", step_return_with_token_ids),
    ("the same, and a prompt admitted", prefill_chunk),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polls", type=int, default=2_000, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results = []
    print(f"{NUM_RUNNING} running requests, {options.polls} polls each, Python {sys.version.split()[0]}")
    print(f"{'microseconds':<36}{'median':>8}{'p99':>8}   target {TARGET_US}")
    for name, measure in CASES:
        durations_ns = measure(options.polls)
        median_us = statistics.median(durations_ns) / 1e3
        p99_us = statistics.quantiles(durations_ns, n=100)[98] / 1e3
        mark = "" if median_us < TARGET_US else "  over"
        print(f"{name:<36}{median_us:>8.1f}{p99_us:>8.1f}{mark}")
        results.append({"case": name, "polls": len(durations_ns), "median_us": median_us, "p99_us": p99_us})
    if options.json is not None:
        options.json.write_text(json.dumps({"schema": 1, "cases": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
