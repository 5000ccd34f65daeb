"""How many times as fast a replay is with fast-forward as without, start-up and reading left out.

    python benchmarks/fast_forward.py [--rounds N] [--limit N] [--cluster NAME]

The trace is Azure's conversation trace of 2023, on one instance unless ``--cluster`` says otherwise. A round is one
replay without fast-forward, with two before it and two after it that have it, so that both see the machine at the same
speed; what counts is the median over all rounds. Times are CPU times.
"""

import argparse
import gc
import statistics
from time import process_time

from replay_speed import BASE_CLUSTER, TRACE, cpu_model

from sagellm.cluster.build import build_cluster
from sagellm.cluster.reading import read_cluster
from sim.cluster import SimCluster
from sim.cluster_file import sim_cluster
from sim.replay import replay
from traces.reader import read_trace
from traces.request_trace import Trace
from traces.shaping import limit


def replay_cpu_s(cluster: SimCluster, trace: Trace) -> float:
    """One replay, without what it leaves behind."""
    gc.collect()
    start_s = process_time()
    result = replay(cluster, trace)
    cpu_s = process_time() - start_s
    assert all(record.finish_reason is not None for record in result.metrics.requests.values())
    return cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="only so many requests")
    parser.add_argument("--cluster", default=BASE_CLUSTER, metavar="NAME", help="in place of %(default)s")
    options = parser.parse_args()
    trace = read_trace(TRACE, seed=0)
    if options.limit is not None:
        trace = limit(trace, options.limit)
    fast, slow = (
        sim_cluster(build_cluster(read_cluster(options.cluster), fast_forward=fast_forward))
        for fast_forward in (True, False)
    )
    print(f"{cpu_model()}; {len(trace.requests)} requests on {options.cluster}; CPU seconds of a replay")
    fast_s: list[float] = []
    slow_s: list[float] = []
    ratios: list[float] = []
    for _ in range(options.rounds):
        before_s = [replay_cpu_s(fast, trace) for _ in range(2)]
        slow_s.append(replay_cpu_s(slow, trace))
        around_s = before_s + [replay_cpu_s(fast, trace) for _ in range(2)]
        fast_s += around_s
        ratios.append(slow_s[-1] / statistics.median(around_s))
        spread = f"{min(around_s):.2f} to {max(around_s):.2f}"
        print(
            f"with {statistics.median(around_s):.2f} ({spread}), without {slow_s[-1]:.2f}: {ratios[-1]:.2f}", flush=True
        )
    print(
        f"with {statistics.median(fast_s):.2f} (best {min(fast_s):.2f}), "
        f"without {statistics.median(slow_s):.2f} (best {min(slow_s):.2f}): "
        f"{statistics.median(ratios):.2f} times, rounds {min(ratios):.2f} to {max(ratios):.2f}; "
        f"of the medians {statistics.median(slow_s) / statistics.median(fast_s):.2f}, "
        f"of the best {min(slow_s) / min(fast_s):.2f}"
    )


if __name__ == "__main__":
    main()
