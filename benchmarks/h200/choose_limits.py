"""What an H200's limits on running requests and on a step's tokens would give, in simulation.

    python -m benchmarks.h200.choose_limits [--profile FILE] [--conversation CSV] [--code CSV] [--jitter 5]

The loads are those of ``serve_online``, the cluster is ``h200x1-sagellm`` with other limits. Prices are those of its
profile, which was fitted to steps of up to 2,304 tokens, or another's (``serve_online --keep`` has what it takes to fit
one). Each figure is the median over runs in which every request is sent up to a millisecond later.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.fidelity import jittered
from benchmarks.h200.serve_online import DATA_FOLDER
from sagellm.cluster.build import build_cluster
from sagellm.cluster.named_files import named_cluster_text
from sagellm.cluster.reading import parse_cluster
from sim.cluster_file import sim_cluster
from sim.replay import replay
from sim.report.summary import summarise
from traces.reader import read_trace
from traces.request_trace import Trace

LIMITS = ((256, 8192), (512, 8192), (512, 4096), (512, 3072), (512, 2304), (512, 1792))
OWN_PROFILE = "h200/sagellm-qwen2.5-7b"
HEADINGS = ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "tokens/s")


def figures(trace: Trace, profile: str, max_num_seqs: int, max_num_batched_tokens: int) -> tuple[float, ...]:
    """Milliseconds and output tokens per second, in the order of HEADINGS."""
    text = named_cluster_text("h200x1-sagellm").replace(OWN_PROFILE, profile)
    text = text.replace("max_num_seqs: 512", f"max_num_seqs: {max_num_seqs}")
    text = text.replace("max_num_batched_tokens: 2304", f"max_num_batched_tokens: {max_num_batched_tokens}")
    cluster = sim_cluster(build_cluster(parse_cluster(text, source="limits", name="limits")))
    summary = summarise(replay(cluster, trace).metrics, {})
    ttft, tpot, tokens_per_s = summary.ttft, summary.tpot, summary.output_throughput
    assert ttft is not None and tpot is not None and tokens_per_s is not None, "nothing was served"  # noqa: PT018
    return ttft.median_ms, ttft.p99_ms, tpot.median_ms, tpot.p99_ms, tokens_per_s


def at_twice_the_rate(trace: Trace) -> Trace:
    requests = (replace(request, arrival_ns=request.arrival_ns // 2) for request in trace.requests)
    return replace(trace, requests=tuple(requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, file in (("conversation", "conv_16"), ("code", "code_6")):
        default = DATA_FOLDER / f"vllm-0.22.1_qwen2.5-7b_online_{file}.csv"
        parser.add_argument(f"--{name}", type=Path, default=default, help="CSV file of vLLM's run of that trace")
    parser.add_argument("--profile", default=OWN_PROFILE, help=f"what prices the steps (default: {OWN_PROFILE})")
    parser.add_argument("--jitter", type=int, default=5, metavar="N", help="runs for each figure (default: 5)")
    options = parser.parse_args()
    conversation, code = (read_trace(path, seed=0) for path in (options.conversation, options.code))
    loads = {"conversation-16": conversation, "conversation-32": at_twice_the_rate(conversation), "code-6": code}
    print(f"{'load':<16}{'seqs':>6}{'tokens':>8}" + "".join(f"{heading:>10}" for heading in HEADINGS))
    for name, trace in loads.items():
        for limits in LIMITS:
            runs = [figures(jittered(trace, seed), options.profile, *limits) for seed in range(options.jitter)]
            medians = "".join(f"{statistics.median(column):>10,.2f}" for column in zip(*runs, strict=True))
            print(f"{name:<16}{limits[0]:>6}{limits[1]:>8}{medians}", flush=True)


if __name__ == "__main__":
    main()
