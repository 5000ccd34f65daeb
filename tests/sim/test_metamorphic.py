"""What must not change when what does not matter does: units of time, names, hash seeds, a replay."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from random import Random

import msgspec
import pytest
from random_runs import LinearCost, Recording, random_cluster, random_faults, random_trace, record

from sagellm.core.identity import RequestId
from sagellm.core.log import LogHeader, LogWriter
from sagellm.core.messages import AssignRequest, RequestArrived, RunStep
from sagellm.core.request import LatencySLO
from sagellm.core.run_metrics import RequestRecord
from sagellm.cost_model.link import Link
from sagellm.cost_model.step_cost import StepCost, StepFeatures
from sagellm.log_replay import diff_logs, replay_log
from sim.arrivals import request_spec
from sim.cluster import SimCluster
from sim.driver import SimDriver
from sim.faults import Fault, InstanceDies, arm_faults
from traces.request_trace import Trace

SEEDS = range(6)
FS_PER_NS = 1_000_000
# The fields of faults and requests that are times.
EVEN = 2


# --- time ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WholeNanoseconds:
    """A price in even nanoseconds, so that neither it nor its double is ever rounded."""

    base: LinearCost
    factor: int

    @property
    def request_overhead_ns(self) -> int:
        return self.base.request_overhead_ns * self.factor

    @property
    def status(self) -> str:
        return "estimate"

    def step_cost(self, features: StepFeatures) -> StepCost:
        cost = self.base.step_cost(features)
        whole = [
            value // (EVEN * FS_PER_NS) * EVEN * FS_PER_NS * self.factor
            for value in (cost.device_fs, cost.device_growth_fs, cost.host_fs)
        ]
        return StepCost(*whole, cost.linear_repeat_max)


def slowed(cluster: SimCluster, factor: int) -> SimCluster:
    """Every duration of a cluster times a factor. Its link: bytes per nanosecond over the factor."""
    instances = tuple(
        replace(
            instance,
            cost_model=WholeNanoseconds(instance.cost_model, factor),  # type: ignore[arg-type]
            config=replace(
                instance.config,
                transfer_timeout_ns=instance.config.transfer_timeout_ns * factor,
                kv_bytes_per_token=1,
            ),
        )
        for instance in cluster.instances
    )
    # A block is 16 bytes, so that any number of up to three transfers share a link in whole nanoseconds.
    link = Link("even", 10_000 * factor, 0.0001 / factor, "spec", "")
    return replace(cluster, instances=instances, link=link, message_latency_ns=cluster.message_latency_ns * factor)


def slowed_trace(trace: Trace, factor: int) -> Trace:
    """Arrivals are made even first, and apart from the times of everything else."""
    requests = tuple(
        replace(r, arrival_ns=(r.arrival_ns // EVEN * EVEN) * factor, gap_ns=r.gap_ns * factor, previous=None)
        for r in trace.requests
    )
    return replace(trace, requests=requests)


def slowed_faults(faults: tuple[Fault, ...], factor: int) -> tuple[Fault, ...]:
    slow: list[Fault] = []
    for fault in faults:
        fault = replace(fault, at_ns=fault.at_ns // EVEN * EVEN * factor)
        if isinstance(fault, InstanceDies):
            fault = replace(fault, detection_ns=max(fault.detection_ns, 1_000_000) * factor)
        slow.append(fault)
    return tuple(slow)


@pytest.mark.parametrize("seed", range(12))
def test_doubling_all_durations_changes_no_decision(seed: int) -> None:
    rng = Random(seed)
    cluster, trace = random_cluster(rng), random_trace(rng)
    faults = random_faults(rng, cluster, trace) if seed % 2 else ()
    runs = [
        record(
            slowed(cluster, factor),
            slowed_trace(trace, factor),
            faults=slowed_faults(faults, factor),
            slo=LatencySLO(100_000_000 * factor, 20_000_000 * factor),
            check=False,
        )
        for factor in (1, 2)
    ]
    once, twice = runs
    # A transfer's end is rounded up to the next nanosecond: that much, and no more, may be lost.
    moves = once.counts["KVTransferred"]
    assert once.tokens.keys() == twice.tokens.keys()
    for request_id, times_ns in once.tokens.items():
        other_ns = twice.tokens[request_id]
        assert len(times_ns) == len(other_ns)
        if moves:
            assert all(abs(2 * a - b) <= 2 * moves for a, b in zip(times_ns, other_ns, strict=True))
        else:
            assert [2 * a for a in times_ns] == other_ns
    assert shape(once) == shape(twice)


def shape(run: Recording) -> list[object]:
    """All decisions of a run without their times."""
    return [
        (machine, effect.plan.num_tokens_by_request(), effect.plan.preempted_request_ids)
        for _, machine, effect in run.effects
        if isinstance(effect, RunStep)
    ] + [
        (effect.instance_id, effect.request.request_id, effect.hand_over)
        for _, _, effect in run.effects
        if isinstance(effect, AssignRequest)
    ]


# --- names -----------------------------------------------------------------------------------------------------


def renamed_run(cluster: SimCluster, trace: Trace, name: dict[int, str], seed: int) -> dict[int, RequestRecord]:
    driver = SimDriver(cluster, seed=seed)
    for index, request in enumerate(trace.requests):
        spec = request_spec(index, request, request.arrival_ns, trace.content_block_size, LatencySLO(100_000_000))
        spec = msgspec.structs.replace(spec, request_id=RequestId(name[index]))
        driver.at(request.arrival_ns, partial(driver.submit, RequestArrived(spec)))
    driver.run()
    records = driver.metrics.metrics.requests
    return {index: records[RequestId(name[index])] for index in range(len(trace.requests))}


@pytest.mark.parametrize("seed", SEEDS)
def test_renaming_requests_changes_no_metric(seed: int) -> None:
    rng = Random(seed)
    cluster, trace = random_cluster(rng), random_trace(rng)
    indices = list(range(len(trace.requests)))
    shuffled = rng.sample(indices, len(indices))
    plain = renamed_run(cluster, trace, {i: str(i) for i in indices}, seed)
    renamed = renamed_run(cluster, trace, {i: f"request-{j}" for i, j in zip(indices, shuffled, strict=True)}, seed)
    for index in indices:
        one, other = plain[index], renamed[index]
        assert outcome(one) == outcome(other)


def outcome(record: RequestRecord) -> list[object]:
    """All of a record but for the request itself."""
    return [getattr(record, name) for name in signature(RequestRecord).parameters if name != "request"]


# --- determinism and replay --------------------------------------------------------------------------------------


def logged_run(seed: int) -> bytes:
    """The log of a random run with faults."""
    rng = Random(seed)
    cluster, trace = random_cluster(rng), random_trace(rng)
    faults = random_faults(rng, cluster, trace)
    file = io.BytesIO()
    configs = tuple(instance.config for instance in cluster.instances)
    log = LogWriter(LogHeader(cluster.name, trace.name, seed, cluster.control_plane, configs), file)
    driver = SimDriver(cluster, seed=seed, log=log)
    for index, request in enumerate(trace.requests):
        spec = request_spec(index, request, request.arrival_ns, trace.content_block_size, LatencySLO(100_000_000))
        driver.at(request.arrival_ns, partial(driver.submit, RequestArrived(spec)))
    arm_faults(driver, faults)
    driver.run()
    log.close()
    return file.getvalue()


def test_the_log_does_not_depend_on_the_hash_seed() -> None:
    """I9, in processes of their own."""
    code = (
        "import hashlib; from test_metamorphic import logged_run; "
        "print([hashlib.sha256(logged_run(seed)).hexdigest() for seed in range(8)])"
    )
    here = Path(__file__).resolve().parent
    outputs = []
    for hash_seed in ("0", "1", "12345"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent.parent)]),
        }
        outputs.append(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True))
    assert len({output.stdout for output in outputs}) == 1
    assert len(json.loads(outputs[0].stdout.decode().replace("'", '"'))) == 8


@pytest.mark.parametrize("seed", SEEDS)
def test_a_log_replays_to_the_same_effects(seed: int) -> None:
    """I10, for runs with faults."""
    lines = logged_run(seed).splitlines(keepends=True)
    result = replay_log(iter(lines), "log")
    assert result.difference is None
    assert result.num_events > 10
    assert result.num_effects > 10
    assert diff_logs(iter(lines), "left", iter(lines), "right") is None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_log_that_was_tampered_with_does_not(seed: int) -> None:
    lines = logged_run(seed).splitlines(keepends=True)
    polls = [number for number, line in enumerate(lines) if b'"RunStep"' in line]
    number = Random(seed).choice(polls)
    changed = lines[number].replace(b'"num_running":', b'"num_running":1', 1)
    if changed == lines[number]:
        changed = lines[number].replace(b'"num_blocks_in_use":', b'"num_blocks_in_use":1', 1)
    assert changed != lines[number]
    tampered = [*lines[:number], changed, *lines[number + 1 :]]
    difference = replay_log(iter(tampered), "log").difference
    assert difference is not None
    assert difference.line == number + 1
    difference = diff_logs(iter(lines), "left", iter(tampered), "right")
    assert difference is not None
    assert difference.line == number + 1
