"""Strategies differ where they should, and nobody starves."""

from functools import partial
from random import Random

import pytest
from random_runs import LinearCost, make_cluster

from sagellm.control_plane.strategies.base import STRATEGY_NAMES
from sagellm.core.config import InstanceConfig
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import RequestArrived
from sagellm.core.request import FinishReason, LatencySLO, RequestSpec
from sagellm.core.run_metrics import RequestRecord
from sim.driver import SimDriver

MILLISECOND, SECOND = 1_000_000, 1_000_000_000
HIGH, LOW = 0, 1
HIGH_SLO, LOW_SLO = LatencySLO(ttft_ns=400 * MILLISECOND), LatencySLO(ttft_ns=2 * SECOND)


def overload(seed: int) -> list[RequestSpec]:
    """Some 1.5 times what one instance can prefill, a quarter of it urgent, for twenty seconds."""
    rng = Random(seed)
    requests: list[RequestSpec] = []
    now_ns = 0.0
    while now_ns < 20 * SECOND:
        now_ns += rng.expovariate(1.0) * 6.5 * MILLISECOND
        is_high = rng.random() < 0.25
        requests.append(
            RequestSpec(
                RequestId(str(len(requests))),
                int(now_ns),
                rng.randrange(100, 500),
                rng.randrange(2, 6),
                HIGH if is_high else LOW,
                HIGH_SLO if is_high else LOW_SLO,
            )
        )
    return requests


def run(requests: list[RequestSpec], strategy: str, **config: object) -> list[RequestRecord]:
    instance = InstanceConfig(InstanceId("m"), num_blocks=2000, max_num_seqs=64, max_num_batched_tokens=512)
    cluster = make_cluster(instance, cost=LinearCost(), strategy=strategy, **config)
    driver = SimDriver(cluster, seed=0)
    for spec in requests:
        driver.at(spec.arrival_ns, partial(driver.submit, RequestArrived(spec)))
    driver.run()
    return list(driver.metrics.metrics.requests.values())


def goodput(records: list[RequestRecord], priority: int | None = None) -> float:
    """The share of requests that completed within their limits."""
    chosen = [record for record in records if priority is None or record.request.priority == priority]
    return sum(record.meets_slo() for record in chosen) / len(chosen)


@pytest.fixture(scope="module")
def records() -> dict[str, list[RequestRecord]]:
    requests = overload(seed=3)
    return {name: run(requests, name, dispatch_tokens_max=1024) for name in STRATEGY_NAMES}


def test_it_is_an_overload(records: dict[str, list[RequestRecord]]) -> None:
    assert goodput(records["fifo"]) < 0.5


def test_slo_aware_keeps_more_limits_than_fifo(records: dict[str, list[RequestRecord]]) -> None:
    assert goodput(records["slo_aware"]) > 1.5 * goodput(records["fifo"])


def test_priority_keeps_the_urgent_class_within_its_limit(records: dict[str, list[RequestRecord]]) -> None:
    assert goodput(records["priority"], HIGH) > 0.99
    assert goodput(records["fifo"], HIGH) < 0.5


def test_adaptive_is_as_good_as_fifo_on_both(records: dict[str, list[RequestRecord]]) -> None:
    assert goodput(records["adaptive"]) >= goodput(records["fifo"])
    assert goodput(records["adaptive"], HIGH) >= goodput(records["fifo"], HIGH)


def test_everybody_is_served_in_the_end(records: dict[str, list[RequestRecord]]) -> None:
    for served in records.values():
        assert {record.finish_reason for record in served} == {FinishReason.LENGTH}


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_a_long_prompt_neither_blocks_the_queue_nor_starves(strategy: str) -> None:
    """Longer than the token budget and than dispatch_tokens_max, amid short ones that never cease."""
    rng = Random(1)
    requests = [
        RequestSpec(RequestId(str(i)), i * 4 * MILLISECOND, rng.randrange(10, 60), 3, slo=LOW_SLO) for i in range(1500)
    ]
    long = RequestSpec(RequestId("long"), 100 * MILLISECOND, 20_000, 3, slo=LOW_SLO)
    served = run([*requests, long], strategy, dispatch_tokens_max=1024)
    by_id = {record.request.request_id: record for record in served}
    assert {record.finish_reason for record in served} == {FinishReason.LENGTH}
    first_token_ns = by_id[RequestId("long")].first_token_ns
    assert first_token_ns is not None
    assert first_token_ns < requests[-1].arrival_ns, "it did not have to wait until nobody else came"
    waits = [record.ttft_ns for record in served if record.ttft_ns is not None]
    prefill_ns = 20_000 * LinearCost().prompt_token_fs // 1_000_000 + 40 * LinearCost().step_fs // 1_000_000
    assert max(waits) < 8 * prefill_ns, "nobody waits for much longer than the long one takes"
