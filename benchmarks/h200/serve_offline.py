"""Offline throughput of the live engine, without HTTP: 256 requests at once, against vLLM 0.22.1 on the same card.

    python -m benchmarks.h200.serve_offline OUT.json [--model Qwen/Qwen2.5-7B]... [--runs 3]

Prompts and outputs are those of `benchmarks/offline_throughput.py`: uniform in 100..1024 tokens, 133,966
output tokens. Weights are drawn at random, sampling is greedy, nothing stops early. The front is this
process, the instance another. One warm-up run comes first; all runs are printed.
"""

import argparse
import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.offline_throughput import LENGTHS, NUM_OUTPUT_TOKENS, NUM_REQUESTS, TOKEN_IDS_MAX
from sagellm.cluster.reading import parse_cluster
from sagellm.core.identity import RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.sampling import GREEDY
from sagellm.server.engine import OutputDelta, RequestOutcome
from sagellm.server.live.deployment import ModelChoice, deploy
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.supervisor import InstanceProcesses

MEASURED_TOKENS_PER_S = {"Qwen/Qwen2.5-7B": 12_237, "Qwen/Qwen3-0.6B": 22_524}
"""Of vLLM 0.22.1, the best of three, on the same kind of card."""

CLUSTER = """\
model: {model}
instances:
  - count: 1
    device: {device}
    max_num_seqs: 256
    max_num_batched_tokens: 8192
    prefix_caching: false
limits:
  dispatch_tokens_max: unlimited
"""


@dataclass(frozen=True, slots=True)
class OfflineResult:
    """One model's runs, output tokens per second of each."""

    model: str
    start_s: float
    tokens_per_s: tuple[float, ...]
    core_us_per_step: float
    num_steps: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """One request of the benchmark."""

    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int


def offline_requests() -> list[Lengths]:
    """As they are drawn from ``random.seed(0)``: all prompts first, with their ids, then all outputs."""
    rng = random.Random(0)
    prompts = [tuple(rng.randint(0, TOKEN_IDS_MAX) for _ in range(rng.randint(*LENGTHS))) for _ in range(NUM_REQUESTS)]
    return [Lengths(prompt, rng.randint(*LENGTHS)) for prompt in prompts]


async def serve_one(engine: LiveEngine, request_id: str, lengths: Lengths) -> int:
    spec = RequestSpec(
        RequestId(request_id),
        engine.now_ns(),
        len(lengths.prompt_token_ids),
        lengths.num_output_tokens,
        prompt_token_ids=lengths.prompt_token_ids,
        sampling=GREEDY,
    )
    num_tokens = 0
    async for item in engine.submit(spec):
        if isinstance(item, OutputDelta):
            num_tokens += len(item.token_ids)
        else:
            assert item == RequestOutcome(FinishReason.LENGTH), item
    return num_tokens


async def serve_all(engine: LiveEngine, run: int, requests: list[Lengths]) -> float:
    """Output tokens per second, from the first submission to the last token."""
    started_s = time.perf_counter()
    counts = await asyncio.gather(
        *(serve_one(engine, f"{run}-{index}", lengths) for index, lengths in enumerate(requests))
    )
    duration_s = time.perf_counter() - started_s
    assert sum(counts) == sum(lengths.num_output_tokens for lengths in requests)
    return sum(counts) / duration_s


async def measure(model: str, device: str, backend: str | None, num_runs: int) -> OfflineResult:
    cluster = parse_cluster(CLUSTER.format(model=model, device=device), source="offline", name="offline")
    deployment = deploy(cluster, ModelChoice("dummy"), backend=backend)
    engine = LiveEngine(
        deployment, InstanceProcesses([each.settings for each in deployment.instances], DriverOptions())
    )
    requests = offline_requests()
    assert sum(each.num_output_tokens for each in requests) == NUM_OUTPUT_TOKENS
    started_s = time.perf_counter()
    await engine.start()
    start_s = time.perf_counter() - started_s
    await serve_all(engine, 0, requests[:32])
    rates = [await serve_all(engine, run, requests) for run in range(1, num_runs + 1)]
    await asyncio.sleep(1)  # the instance's last word about itself
    status = engine.snapshots()[0].status
    await engine.drain(5)
    return OfflineResult(
        model, start_s, tuple(rates), status.core_ns / 1e3 / max(1, status.num_steps), status.num_steps
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--model", action="append", help="a known model's name; repeatable")
    parser.add_argument("--device", default="h200")
    parser.add_argument("--backend", default=None)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    results = []
    for model in arguments.model or list(MEASURED_TOKENS_PER_S):
        result = asyncio.run(measure(model, arguments.device, arguments.backend, arguments.runs))
        results.append(asdict(result))
        rates = ", ".join(f"{rate:,.0f}" for rate in result.tokens_per_s)
        target = MEASURED_TOKENS_PER_S.get(model)
        beside = "" if target is None else f"; vLLM {target:,}: {max(result.tokens_per_s) / target - 1:+.1%} (best)"
        print(f"{model}: ready after {result.start_s:.1f} s; {rates} output tokens/s{beside}")
        print(f"  {result.num_steps:,} steps, {result.core_us_per_step:.0f} us of the core each", flush=True)
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
