"""A small run gives the log that is stored in ``tests/golden``, line by line.

Where a change of decisions is meant, renew it and read the difference before it is committed::

    python tests/sim/test_golden_log.py
"""

import io
from functools import partial
from itertools import zip_longest
from pathlib import Path

import msgspec
from random_runs import LinearCost, make_cluster

from sagellm.core.config import HandoverStart, InstanceConfig, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.log import LogHeader, LogWriter
from sagellm.core.messages import RequestArrived
from sagellm.core.repetition_ends import RepetitionEnds
from sagellm.core.request import LatencySLO
from sagellm.cost_model.link import Link
from sagellm.log_replay import replay_log
from sim.arrivals import request_spec
from sim.cluster import SimCluster
from sim.driver import SimDriver
from sim.faults import ClientCancels, Fault, InstanceDies, StepFails, arm_faults
from traces.request_trace import TraceRequest

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "disaggregated.jsonl"
MILLISECOND = 1_000_000

REQUESTS = (
    TraceRequest(0, 200, 8, content_ids=tuple(range(13))),
    TraceRequest(1 * MILLISECOND, 20, 12),
    TraceRequest(5 * MILLISECOND, 208, 4, content_ids=tuple(range(13)), priority=1),
    TraceRequest(40 * MILLISECOND, 90, 20),
    TraceRequest(60 * MILLISECOND, 300, 3),
    TraceRequest(61 * MILLISECOND, 40, 30, priority=2),
    TraceRequest(90 * MILLISECOND, 130, 16),
    TraceRequest(120 * MILLISECOND, 10, 2),
)
FAULTS: tuple[Fault, ...] = (
    StepFails(70 * MILLISECOND, InstanceId("d0")),
    ClientCancels(100 * MILLISECOND, RequestId("5")),
    InstanceDies(130 * MILLISECOND, InstanceId("d1"), 50 * MILLISECOND),
)


def cluster() -> SimCluster:
    """Two of each, blocks streamed over a slow link, prompts cut to 128 tokens, little KV."""
    configs = [
        InstanceConfig(
            InstanceId(f"{role.value[0]}{i}"),
            num_blocks=26,
            role=role,
            kv_bytes_per_token=100_000,
            max_num_seqs=4,
            max_num_batched_tokens=128,
        )
        for role in (Role.PREFILL, Role.DECODE)
        for i in range(2)
    ]
    link = Link("slow", 10_000, 5.0, "spec", "")
    return make_cluster(*configs, cost=LinearCost(), link=link, handover_start=HandoverStart.STREAMED)


def run_log() -> list[bytes]:
    file = io.BytesIO()
    small = cluster()
    configs = tuple(instance.config for instance in small.instances)
    log = LogWriter(LogHeader("small", "golden", 0, small.control_plane, configs), file)
    driver = SimDriver(small, seed=0, log=log, check=True)
    for index, request in enumerate(REQUESTS):
        spec = request_spec(index, request, request.arrival_ns, 16, LatencySLO(200 * MILLISECOND))
        driver.at(request.arrival_ns, partial(driver.submit, RequestArrived(spec)))
    arm_faults(driver, FAULTS)
    driver.run()
    log.close()
    return file.getvalue().splitlines()


def test_the_log_is_the_stored_one() -> None:
    stored = GOLDEN.read_bytes().splitlines()
    for number, (then, now) in enumerate(zip_longest(stored, run_log()), start=1):
        assert then == now, f"{GOLDEN.name}, line {number}; see this file's docstring for how to renew it"


def test_a_log_of_schema_2_can_be_replayed() -> None:
    """It lists all ends."""
    listed, num_series = [], 0
    for line in GOLDEN.read_bytes().splitlines():
        record = msgspec.json.decode(line)
        if isinstance(record, dict):
            record["schema"] = 2
        else:
            for message in record[2] if isinstance(record[2], list) else [record[2]]:
                if isinstance(message.get("ends_ns"), dict):
                    message["ends_ns"] = list(msgspec.convert(message["ends_ns"], RepetitionEnds))
                    num_series += 1
        listed.append(msgspec.json.encode(record) + b"\n")
    assert num_series
    result = replay_log(iter(listed), "log")
    assert result.difference is None
    assert result.num_polls


def test_it_shows_what_it_should() -> None:
    kinds = (
        b"early_fs",
        b"TransferKV",
        b"HandoverFinished",
        b"StepProgressed",
        b"StepFailed",
        b"InstanceLost",
        b"AbortRequest",
    )
    text = GOLDEN.read_bytes()
    assert not [kind for kind in kinds if kind not in text]


if __name__ == "__main__":
    GOLDEN.write_bytes(b"\n".join(run_log()) + b"\n")
