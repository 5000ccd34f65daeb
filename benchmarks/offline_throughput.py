"""Offline throughput against vLLM 0.22.1 on one H200: runs that no constant was fitted to.

    python benchmarks/offline_throughput.py

256 requests at once, prompts and outputs uniform in 100..1024 tokens, drawn in the order in which
nano-vllm's benchmark draws them from ``random.seed(0)``: 133,966 output tokens. Measured figures are the
best of three, on the machine on which the profiles were fitted.
"""

import random
from dataclasses import dataclass

from sagellm.cluster.build import build_cluster
from sagellm.cluster.reading import parse_cluster
from sim.cluster_file import sim_cluster
from sim.replay import replay
from sim.report.summary import summarise
from traces.request_trace import Trace, TraceRequest

NUM_REQUESTS = 256
LENGTHS = (100, 1024)
NUM_OUTPUT_TOKENS = 133_966
TOKEN_IDS_MAX = 10_000  # the benchmark draws each prompt's token ids before the next prompt's length

CLUSTER = """\
model: {model}
instances:
  - count: 1
    profile: {profile}
    max_num_seqs: 256
    max_num_batched_tokens: 8192
    prefix_caching: false
limits:
  dispatch_tokens_max: unlimited
"""


@dataclass(frozen=True, slots=True)
class OfflineRun:
    """What was measured, and what prices the simulation of it."""

    model: str
    profile: str
    measured_tokens_per_s: float


RUNS = (
    OfflineRun("Qwen/Qwen2.5-7B", "h200/vllm-0.22.1-qwen2.5-7b", 12_237),
    OfflineRun("Qwen/Qwen2.5-7B", "h200/vllm-0.22.1", 12_237),
    OfflineRun("Qwen/Qwen3-0.6B", "h200/vllm-0.22.1", 22_524),
)


def offline_trace() -> Trace:
    """All requests at time 0."""
    rng = random.Random(0)
    prompts = []
    for _ in range(NUM_REQUESTS):
        prompts.append(rng.randint(*LENGTHS))
        for _ in range(prompts[-1]):
            rng.randint(0, TOKEN_IDS_MAX)
    outputs = [rng.randint(*LENGTHS) for _ in range(NUM_REQUESTS)]
    assert sum(outputs) == NUM_OUTPUT_TOKENS, f"{sum(outputs)} output tokens are not those of the measured runs"
    return Trace("offline", tuple(TraceRequest(0, *lengths) for lengths in zip(prompts, outputs, strict=True)))


def simulated_tokens_per_s(run: OfflineRun, trace: Trace) -> float:
    text = CLUSTER.format(model=run.model, profile=run.profile)
    cluster = parse_cluster(text, source="the benchmark's cluster", name="offline")
    throughput = summarise(replay(sim_cluster(build_cluster(cluster)), trace).metrics, {}).output_throughput
    assert throughput is not None
    return throughput


def main() -> None:
    trace = offline_trace()
    print(f"{'model':<18}{'profile':<30}{'measured':>10}{'simulated':>11}{'error':>9}   (output tokens/s)")
    for run in RUNS:
        simulated = simulated_tokens_per_s(run, trace)
        error = simulated / run.measured_tokens_per_s - 1
        print(f"{run.model:<18}{run.profile:<30}{run.measured_tokens_per_s:>10,.0f}{simulated:>11,.0f}{error:>+9.1%}")


if __name__ == "__main__":
    main()
