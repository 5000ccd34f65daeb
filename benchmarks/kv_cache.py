"""What the KV cache costs per call, and what it finds on the Mooncake conversation trace.

    python benchmarks/kv_cache.py [--trace FILE] [--limit N]

Latencies: requests of that trace, in blocks of 16 tokens, through a ``KVCache`` that is full for most
of the run, so that evictions are in the figures; once with the trace's content ids, once without any
identity. Hit ratios: blocks of 512 tokens, as the trace has them; a prompt's last, partly filled
block counts as a block.
"""

import argparse
import json
import statistics
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import ParamSpec, TypeVar

from sagellm.core.identity import RequestId
from sagellm.core.request import RequestSpec
from sagellm.kv_policy.eviction import EVICTION_POLICIES
from sagellm.kv_runtime.hit_ratio import count_hit_blocks, count_optimal_hit_blocks
from sagellm.kv_runtime.kv_cache import KVCache, RequestBlocks

DEFAULT_TRACE = Path(__file__).resolve().parents[2] / "shared/data/traces/mooncake_conversation.jsonl"
CONTENT_BLOCK_SIZE = 512  # tokens per content id of the trace
BLOCK_SIZE = 16  # tokens
NUM_BLOCKS = 100_000
NUM_RUNNING = 32  # requests that hold blocks at a time
NUM_GROWN = 20  # blocks that each request grows by, one at a time

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Stopwatch:
    """Durations of calls, by name; reading the clock is in them, some 0.1 us."""

    def __init__(self) -> None:
        self.durations_ns: dict[str, list[int]] = defaultdict(list)

    def call(
        self, function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result:
        start_ns = perf_counter_ns()
        result = function(*arguments, **named)
        self.durations_ns[function.__name__].append(perf_counter_ns() - start_ns)
        return result

    def print_table(self, title: str) -> None:
        print(f"{title}\n{'call':<12}{'calls':>9}{'median us':>12}{'p99 us':>10}")
        for name, durations_ns in self.durations_ns.items():
            median_us = statistics.median(durations_ns) / 1e3
            p99_us = statistics.quantiles(durations_ns, n=100)[98] / 1e3
            print(f"{name:<12}{len(durations_ns):>9}{median_us:>12.2f}{p99_us:>10.2f}")
        print()


def read_requests(path: Path, limit: int | None) -> list[RequestSpec]:
    """The trace's requests, as far as their prompts go."""
    with path.open() as lines:
        rows = [json.loads(line) for line in lines][:limit]
    return [
        RequestSpec(
            RequestId(str(index)),
            0,
            row["input_length"],
            row["output_length"],
            content_ids=tuple(row["hash_ids"]),
            content_block_size=CONTENT_BLOCK_SIZE,
        )
        for index, row in enumerate(rows)
    ]


def without_identity(request: RequestSpec) -> RequestSpec:
    return RequestSpec(request.request_id, 0, request.num_prompt_tokens, request.max_output_tokens)


def measure_latencies(requests: list[RequestSpec]) -> Stopwatch:
    """Let the requests through, each from match to release, ``NUM_RUNNING`` of them at a time."""
    cache, stopwatch = KVCache(NUM_BLOCKS, BLOCK_SIZE, prefix_caching=True), Stopwatch()
    running: deque[RequestBlocks] = deque()
    for request in requests:
        if len(running) == NUM_RUNNING:
            stopwatch.call(cache.release, running.popleft())
        match = stopwatch.call(cache.match, request)
        num_tokens = request.num_prompt_tokens
        while not stopwatch.call(cache.can_admit, match, num_tokens, NUM_RUNNING * NUM_GROWN):
            cache.release(running.popleft())
        blocks = stopwatch.call(cache.admit, request, match, num_tokens)
        stopwatch.call(cache.publish, request, blocks, num_tokens)
        running.append(blocks)
        for _ in range(NUM_GROWN):
            stopwatch.call(cache.grow, blocks, 1)
    while running:
        cache.release(running.popleft())
    cache.check()
    return stopwatch


def print_hit_ratios(requests: list[RequestSpec]) -> None:
    prompts = [request.content_ids for request in requests]
    num_asked = sum(map(len, prompts))
    print(f"Prefix-hit ratio of {num_asked} blocks of {CONTENT_BLOCK_SIZE} tokens")
    print(f"{'blocks':>10}" + "".join(f"{name:>9}" for name in EVICTION_POLICIES) + f"{'Belady':>9}")
    for num_blocks in (1_000, 3_000, 10_000, 30_000, 50_000, 100_000, num_asked):
        hits = [count_hit_blocks(prompts, num_blocks, name) for name in EVICTION_POLICIES]
        hits.append(count_optimal_hit_blocks(prompts, num_blocks))
        name = "unbounded" if num_blocks == num_asked else str(num_blocks)
        print(f"{name:>10}" + "".join(f"{number / num_asked:>9.4f}" for number in hits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE, help="Mooncake's JSON lines")
    parser.add_argument("--limit", type=int, help="use so many requests only")
    arguments = parser.parse_args()
    if not arguments.trace.exists():
        parser.error(f"--trace: {arguments.trace} is not there, give the path of a Mooncake trace")
    requests = read_requests(arguments.trace, arguments.limit)
    mean_blocks = statistics.mean(request.num_prompt_tokens for request in requests) / BLOCK_SIZE
    print(f"{len(requests)} requests, {mean_blocks:.0f} blocks of {BLOCK_SIZE} tokens each on average, "
          f"a cache of {NUM_BLOCKS} blocks, {NUM_RUNNING} at a time\n")  # fmt: skip
    measure_latencies(requests).print_table("With content ids")
    measure_latencies([without_identity(request) for request in requests]).print_table("Without identity")
    print_hit_ratios(requests)


if __name__ == "__main__":
    main()
