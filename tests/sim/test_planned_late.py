"""Steps that are planned late, in random clusters with faults: all ends once, and invariants hold after each poll."""

import os
from dataclasses import replace
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_runs import assert_all_is_over, random_cluster, random_faults, random_trace, record, without_fast_forward

from sim.cluster import SimCluster

NUM_EXAMPLES = int(os.environ.get("SAGELLM_EXAMPLES", "25"))


def planned_late(cluster: SimCluster, lead_ns: int) -> SimCluster:
    instances = tuple(replace(i, config=replace(i.config, plan_lead_ns=lead_ns)) for i in cluster.instances)
    return replace(cluster, instances=instances)


@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 40), lead_ns=st.sampled_from([1, 100_000, 2_000_000, 50_000_000]))
def test_everything_ends_once(seed: int, lead_ns: int) -> None:
    rng = Random(seed)
    cluster, trace = random_cluster(rng), random_trace(rng)
    faults = random_faults(rng, cluster, trace) if rng.random() < 0.7 else ()
    late = planned_late(without_fast_forward(cluster), lead_ns)
    assert_all_is_over(record(late, trace, seed=seed, faults=faults))
