"""What a replay leaves behind while nobody looks for cycles."""

import gc

from sagellm.cluster.build import build_cluster
from sagellm.cluster.reading import read_cluster
from sim.cluster_file import sim_cluster
from sim.replay import replay
from traces.generators import generate


def num_unreachable(num_requests: int) -> int:
    """Objects that only the search for cycles can free, after a run whose result is still in hand."""
    cluster = sim_cluster(build_cluster(read_cluster("h200x1")))
    trace = generate("azure-conv", num_requests=num_requests, seed=0)
    gc.collect()
    gc.disable()
    try:
        result = replay(cluster, trace)
        assert len(result.metrics.requests) == num_requests
        return gc.collect()
    finally:
        gc.enable()


def test_cycles_do_not_grow_with_the_run() -> None:
    """Each step or request that kept itself alive would add up: the search is off during a run."""
    few, many = num_unreachable(20), num_unreachable(220)
    assert many - few < 20
