"""What serving costs beside the model: front, processes and scheduling, before an executor that costs nothing.

    python benchmarks/serving_overhead.py --engine [--streams N] [--tokens N] [--step-ms X] [--requests N]

`--engine` is the live driver without HTTP: this process is the front, one more is an instance whose
steps are over as soon as they are launched, with made-up tokens. Three loads:

* `--streams` requests at once, each of `--tokens` output tokens, each read as it comes. Printed are the
  rate, the processor time of either process for each token and step, the machine's own share of a
  step, and the longest time that any stream waited for its next token, beside the median of these;
* the same streams where a step takes `--step-ms`, the pace of a real device, with the instance as a thread of
  this process: the processor time of everything together, and again the longest gaps;
* `--requests` requests, 64 at a time, after which every block and queue must be as at the start, and the
  memory of both processes is compared with what it was after the first tenth.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from backends.executor_settings import ExecutorSettings
from backends.model_runner.factory import NULL_BACKEND, make_executor
from backends.null.executor import NullExecutor
from sagellm.core.config import ControlPlaneConfig, InstanceConfig
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.server.engine import OutputDelta, RequestOutcome
from sagellm.server.live.deployment import DeployedInstance, Deployment
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.instance_host import InstanceHost
from sagellm.server.live.supervisor import InstanceProcesses
from sagellm.server.live.threaded_instances import ExecutorFactory, ThreadedInstances

NUM_PROMPT_TOKENS = 128
NUM_BLOCKS = 128_511  # what an H200 has beside a 7B model
CONCURRENCY_IN_A_ROW = 64
NUM_BLOCKS_IN_A_ROW = 4_096
CLOCK_TICKS_PER_S = 100  # of /proc, on Linux
KIB_PER_PAGE = 4


@dataclass(frozen=True, slots=True)
class ProcessUse:
    """Processor time since the start, and memory now."""

    cpu_s: float
    rss_kib: int


@dataclass(frozen=True, slots=True)
class StreamsResult:
    """`--streams` requests at once."""

    num_streams: int
    num_tokens: int
    num_steps: int
    wall_s: float
    tokens_per_s: float
    front_us_per_token: float
    instance_us_per_step: float  # with everything around the machine
    core_us_per_step: float  # the machine's handle and poll
    longest_gap_ms_median: float  # over streams: the longest wait of each for a token after its first
    longest_gap_ms_max: float


@dataclass(frozen=True, slots=True)
class PacedResult:
    """`--streams` requests at once, where steps take their time; front and instance in one process."""

    num_streams: int
    step_ms: float
    wall_s: float
    tokens_per_s: float
    cpu_us_per_token: float
    cpu_share_of_a_core: float
    longest_gap_ms_median: float
    longest_gap_ms_max: float


@dataclass(frozen=True, slots=True)
class InARowResult:
    """`--requests` requests, some at a time."""

    num_requests: int
    wall_s: float
    requests_per_s: float
    front_ms_per_request: float
    num_blocks_in_use_after: int
    num_unfinished_after: int
    front_growth_kib: int
    instance_growth_kib: int


def make_engine(
    num_streams: int, make_thread_executor: ExecutorFactory | None, num_blocks: int = NUM_BLOCKS
) -> LiveEngine:
    """One instance that takes all streams into one step; a thread with that executor, or a process."""
    places = num_streams + 8
    config = InstanceConfig(
        InstanceId("mixed-0"),
        num_blocks,
        max_num_seqs=places,
        max_num_batched_tokens=max(8192, places),
        repeat_max=1,
    )
    settings = ExecutorSettings(config, "made-up", NULL_BACKEND)
    deployment = Deployment("overhead", "made-up", ControlPlaneConfig(), (DeployedInstance(settings, "none"),))
    options = DriverOptions()
    host: InstanceHost = (
        InstanceProcesses([settings], options)
        if make_thread_executor is None
        else ThreadedInstances([settings], make_thread_executor, options)
    )
    return LiveEngine(deployment, host)


def make_request(engine: LiveEngine, index: int, num_output_tokens: int) -> RequestSpec:
    """Prompts differ from their first token on."""
    prompt = (index, *range(NUM_PROMPT_TOKENS - 1))
    return RequestSpec(RequestId(str(index)), engine.now_ns(), len(prompt), num_output_tokens, prompt_token_ids=prompt)


async def longest_gap_s(engine: LiveEngine, spec: RequestSpec) -> float:
    """Read a stream to its end."""
    num_tokens, last_s, longest_s = 0, 0.0, 0.0
    async for item in engine.submit(spec):
        if isinstance(item, OutputDelta):
            now_s = time.perf_counter()
            if num_tokens:
                longest_s = max(longest_s, now_s - last_s)
            last_s = now_s
            num_tokens += len(item.token_ids)
        else:
            assert item == RequestOutcome(FinishReason.LENGTH), item
    assert num_tokens == spec.max_output_tokens
    return longest_s


async def measure_streams(num_streams: int, num_tokens: int, single_process: bool) -> StreamsResult:
    engine = make_engine(num_streams, make_executor if single_process else None)
    await engine.start()
    await longest_gap_s(engine, make_request(engine, -1, 8))
    status = engine.snapshots()[0].status
    instance, front_s, start_s = _children_use(), time.process_time(), time.perf_counter()
    specs = [make_request(engine, index, num_tokens) for index in range(num_streams)]
    gaps_s = await asyncio.gather(*(longest_gap_s(engine, spec) for spec in specs))
    wall_s, front_s = time.perf_counter() - start_s, time.process_time() - front_s
    instance_s = _children_use().cpu_s - instance.cpu_s
    after = engine.snapshots()[0].status
    await engine.drain(0)
    num_steps = after.num_steps - status.num_steps
    num_all = num_streams * num_tokens
    return StreamsResult(
        num_streams=num_streams,
        num_tokens=num_all,
        num_steps=num_steps,
        wall_s=wall_s,
        tokens_per_s=num_all / wall_s,
        front_us_per_token=front_s / num_all * 1e6,
        instance_us_per_step=instance_s / num_steps * 1e6,
        core_us_per_step=(after.core_ns - status.core_ns) / num_steps / 1e3,
        longest_gap_ms_median=statistics.median(gaps_s) * 1e3,
        longest_gap_ms_max=max(gaps_s) * 1e3,
    )


async def measure_paced(num_streams: int, num_tokens: int, step_ms: float) -> PacedResult:
    engine = make_engine(num_streams, lambda settings: NullExecutor(settings, lambda _: round(step_ms * 1e6)))
    await engine.start()
    cpu_s, start_s = time.process_time(), time.perf_counter()
    specs = [make_request(engine, index, num_tokens) for index in range(num_streams)]
    gaps_s = await asyncio.gather(*(longest_gap_s(engine, spec) for spec in specs))
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    await engine.drain(0)
    return PacedResult(
        num_streams=num_streams,
        step_ms=step_ms,
        wall_s=wall_s,
        tokens_per_s=num_streams * num_tokens / wall_s,
        cpu_us_per_token=cpu_s / (num_streams * num_tokens) * 1e6,
        cpu_share_of_a_core=cpu_s / wall_s,
        longest_gap_ms_median=statistics.median(gaps_s) * 1e3,
        longest_gap_ms_max=max(gaps_s) * 1e3,
    )


async def measure_in_a_row(num_requests: int, single_process: bool) -> InARowResult:
    # So few blocks that the prefix cache is full after the first tenth: what grows after that is a leak.
    engine = make_engine(CONCURRENCY_IN_A_ROW, make_executor if single_process else None, NUM_BLOCKS_IN_A_ROW)
    await engine.start()
    indexes = iter(range(num_requests))

    async def client(until: int) -> None:
        for index in indexes:
            await longest_gap_s(engine, make_request(engine, index, 8))
            if index >= until:
                return

    front_s, start_s = time.process_time(), time.perf_counter()
    await asyncio.gather(*(client(num_requests // 10) for _ in range(CONCURRENCY_IN_A_ROW)))
    front, instance = _use_of("self"), _children_use()
    await asyncio.gather(*(client(num_requests) for _ in range(CONCURRENCY_IN_A_ROW)))
    wall_s, front_s = time.perf_counter() - start_s, time.process_time() - front_s
    front_after, instance_after = _use_of("self"), _children_use()
    num_unfinished = engine.num_unfinished + engine.num_queued
    await engine.drain(0)
    return InARowResult(
        num_requests=num_requests,
        wall_s=wall_s,
        requests_per_s=num_requests / wall_s,
        front_ms_per_request=front_s / num_requests * 1e3,
        num_blocks_in_use_after=engine.snapshots()[0].status.num_blocks_in_use,
        num_unfinished_after=num_unfinished,
        front_growth_kib=front_after.rss_kib - front.rss_kib,
        instance_growth_kib=instance_after.rss_kib - instance.rss_kib,
    )


def _children_use() -> ProcessUse:
    """Of all processes that this one has started; nothing where there are none, or no /proc."""
    path = Path("/proc/self/task")
    children = [each for task in path.glob("*/children") for each in task.read_text().split()]
    uses = [_use_of(each) for each in children]
    return ProcessUse(sum(use.cpu_s for use in uses), sum(use.rss_kib for use in uses))


def _use_of(process_id: str) -> ProcessUse:
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return ProcessUse((int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S, int(fields[21]) * KIB_PER_PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description="What serving costs beside the model.")
    parser.add_argument("--engine", action="store_true", required=True, help="the live driver, without HTTP")
    parser.add_argument("--streams", type=int, default=1_000)
    parser.add_argument("--tokens", type=int, default=200, help="output tokens of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the paced load")
    parser.add_argument("--requests", type=int, default=10_000, help="in a row")
    parser.add_argument("--single-process", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    streams = asyncio.run(measure_streams(arguments.streams, arguments.tokens, arguments.single_process))
    paced = asyncio.run(measure_paced(arguments.streams, arguments.tokens, arguments.step_ms))
    in_a_row = asyncio.run(measure_in_a_row(arguments.requests, arguments.single_process))
    results = {"streams": asdict(streams), "paced": asdict(paced), "in_a_row": asdict(in_a_row)}
    for name, result in results.items():
        print(name)
        for field, value in result.items():
            print(f"  {field:28}{value:>14,.1f}" if isinstance(value, float) else f"  {field:28}{value:>14,}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if in_a_row.num_blocks_in_use_after or in_a_row.num_unfinished_after:
        sys.exit("something was left behind")


if __name__ == "__main__":
    main()
