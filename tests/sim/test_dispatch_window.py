"""The window of prompts that an instance is given keeps its steps full, however long prompts are beside its steps."""

from functools import partial
from random import Random

import pytest
from random_runs import LinearCost, make_cluster

from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import RequestArrived
from sagellm.core.request import RequestSpec
from sim.driver import SimDriver

STEP_TOKENS = 256
UNLIMITED = 1 << 50


def finished_ns(requests: list[RequestSpec], dispatch_tokens_max: int) -> int:
    """When the last of them is over, on one instance."""
    instance = InstanceConfig(InstanceId("m"), 20_000, max_num_seqs=64, max_num_batched_tokens=STEP_TOKENS)
    driver = SimDriver(make_cluster(instance, cost=LinearCost(), dispatch_tokens_max=dispatch_tokens_max), seed=0)
    for spec in requests:
        driver.at(spec.arrival_ns, partial(driver.submit, RequestArrived(spec)))
    driver.run()
    records = driver.metrics.metrics.requests.values()
    assert all(record.finish_reason is not None for record in records)
    return max(record.last_token_ns or 0 for record in records)


@pytest.mark.parametrize("longest_steps", [1, 3, 10])
def test_the_default_window_costs_no_throughput(longest_steps: int) -> None:
    rng = Random(longest_steps)
    requests = [
        RequestSpec(RequestId(str(index)), 0, rng.randrange(20, longest_steps * STEP_TOKENS), 1) for index in range(200)
    ]
    assert finished_ns(requests, 0) <= 1.002 * finished_ns(requests, UNLIMITED)
