"""Whatever fails, each request ends once, with the tokens of an undisturbed run, and nothing is left over.

Everything that can go wrong does, at random: instances are killed, devices die, steps fail, KV comes
late, twice or not at all, clients leave. The devices' tokens depend on the content of KV blocks.
"""

import asyncio
import io
import os
import threading
import time
from dataclasses import dataclass
from random import Random

import pytest
from both_drivers import Cluster
from content_device import ContentDevice, DeviceFaults, undisturbed

import sagellm.server.live.kv_transfers as kv_transfers
from backends.executor_settings import ExecutorSettings
from sagellm.core.config import ControlPlaneConfig, HandoverStart, InstanceConfig, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.sampling import SamplingParameters
from sagellm.core.step_executor import StepExecutor
from sagellm.log_replay import replay_log
from sagellm.server.engine import OutputDelta, Refusal, RequestOutcome
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions, InstanceDriver
from sagellm.server.live.live_log import LiveLog
from sagellm.server.live.threaded_instances import ExecutorFactory, ThreadedInstances
from sagellm.server.live.wire import FromInstance, PeerMessage, TransferCancelled

NUM_SEEDS = int(os.environ.get("SAGELLM_CHAOS_SEEDS", "40"))
FIRST_SEED = int(os.environ.get("SAGELLM_CHAOS_FIRST", "0"))
LIVE_S_MAX = 60.0
LAYOUTS = ("m", "mm", "mmm", "pd", "pdd", "ppd", "ppdd", "pm", "pmd")
ROLES = {"m": Role.MIXED, "p": Role.PREFILL, "d": Role.DECODE}


@dataclass(frozen=True)
class Client:
    """One request, and how its client behaves."""

    request: RequestSpec
    arrival_s: float
    leaves_after: int | None  # tokens; None: it stays
    pause_s: float  # before each look


@dataclass(frozen=True)
class Chaos:
    """One run."""

    seed: int
    cluster: Cluster
    clients: tuple[Client, ...]
    kills: tuple[tuple[float, InstanceId], ...]
    kills_by_message: dict[InstanceId, int]  # after so many messages between it and its peers
    faults: dict[InstanceId, DeviceFaults]
    lost_share: float  # of peers' messages
    late_share: float
    pause_s_max: float  # before an instance says something: its device goes on meanwhile
    drain_s: float | None  # when the server is stopped; None: when all is over
    grace_s: float


def chaos_of(seed: int) -> Chaos:
    random = Random(seed)
    layout = random.choice(LAYOUTS)
    ids = [InstanceId(f"{letter}{index}") for index, letter in enumerate(layout)]
    instances = tuple(_instance(each, ROLES[each[0]], random) for each in ids)
    config = ControlPlaneConfig(
        strategy=random.choice(["fifo", "priority"]),
        routing=random.choice(["least_loaded", "round_robin"]),
        handover_start=random.choice(list(HandoverStart)),
        disaggregate_min_tokens=random.choice([0, 0, 12]),
        dispatch_tokens_max=random.choice([0, 30]),
        queue_max=random.choice([1, 100, 100, 100]),
        attempts_max=20,
    )
    # One instance stays, whichever it is.
    doomed = random.sample(ids, random.randint(0, len(ids) - 1))
    span_s = random.choice([0.01, 0.05, 0.15])
    failed_share = random.choice([0.0, 0.0, 0.05])
    invalid_share = random.choice([0.0, 0.0, 0.005])
    step_s_max = random.choice([0.0, 0.001, 0.004])
    faults = {
        each: DeviceFaults(failed_share, invalid_share, step_s_max, _last_step(each, doomed, random)) for each in ids
    }
    sudden = [each for each in doomed if faults[each].num_steps_max is None]
    by_message = {each: random.randint(1, 12) for each in sudden if random.random() < 0.6}
    return Chaos(
        seed,
        Cluster(instances, config),
        tuple(_client(number, span_s, random) for number in range(random.randint(3, 24))),
        tuple((random.uniform(0, span_s), each) for each in sudden if each not in by_message),
        by_message,
        faults,
        random.choice([0.0, 0.0, 0.2]),
        random.choice([0.0, 0.0, 0.3]),
        random.choice([0.0, 0.003]),
        random.choice([None, None, None, random.uniform(0, 2 * span_s)]),
        random.choice([0.0, 0.02, 5.0]),
    )


def _last_step(instance_id: InstanceId, doomed: list[InstanceId], random: Random) -> int | None:
    return random.randint(1, 40) if instance_id in doomed and random.random() < 0.3 else None


def _instance(instance_id: InstanceId, role: Role, random: Random) -> InstanceConfig:
    max_num_seqs = random.choice([1, 2, 8])
    return InstanceConfig(
        instance_id,
        num_blocks=random.choice([24, 30, 80]),
        role=role,
        block_size=4,
        kv_bytes_per_token=1,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=random.choice([max_num_seqs, 16, 40]),
        steps_in_flight_max=random.choice([1, 2]),
        prefix_caching=random.random() < 0.7,
        repeat_max=1,
        step_attempts_max=1000,
        transfer_timeout_ns=random.choice([2_000_000, 20_000_000, 1_000_000_000]),
    )


def _client(number: int, span_s: float, random: Random) -> Client:
    num_shared = random.choice([0, 8, 18])
    own = [random.randrange(40) for _ in range(random.randint(1, 30))]
    prompt = (*range(num_shared), *own)
    num_output_tokens = random.choice([1, 2, 12, 40])
    request = RequestSpec(
        RequestId(f"r{number}"),
        0,
        len(prompt),
        num_output_tokens,
        priority=random.randint(0, 2),
        prompt_token_ids=prompt,
        stop_token_ids=(7, 11) if random.random() < 0.3 else (),
        sampling=SamplingParameters(num_logprobs=random.choice([None, 0])),
    )
    leaves_after = random.randint(0, num_output_tokens) if random.random() < 0.3 else None
    return Client(request, random.uniform(0, span_s), leaves_after, random.choice([0.0, 0.0, 0.02]))


class UnreliablePeers(ThreadedInstances):
    """Loses and delays what instances say to each other directly, and lets them lose time."""

    def __init__(self, chaos: Chaos, make_executor: ExecutorFactory) -> None:
        settings = [each.settings for each in chaos.cluster.deployment().instances]
        super().__init__(settings, make_executor, DriverOptions(keeps_log=True, checks=True))
        self.chaos = chaos
        self._random = Random(chaos.seed)
        self._num_messages_left = dict(chaos.kills_by_message)

    def drivers(self) -> dict[InstanceId, InstanceDriver]:
        return {instance_id: thread.driver for instance_id, thread in self._threads.items() if thread.driver}

    def to_front(self, message: FromInstance) -> None:
        if self.chaos.pause_s_max and self._random.random() < 0.1:
            time.sleep(self._random.uniform(0, self.chaos.pause_s_max))
        super().to_front(message)

    def to_peer(self, peer_id: InstanceId, message: PeerMessage) -> None:
        sender_id = InstanceId(threading.current_thread().name.removeprefix("instance "))
        for instance_id in self._num_messages_left.keys() & {sender_id, peer_id}:
            self._num_messages_left[instance_id] -= 1
            if self._num_messages_left[instance_id] == 0:
                self._threads[instance_id].is_killed = True  # it ends with its present turn, and here
                self._loop.call_soon_threadsafe(self.kill, instance_id)
        fate = self._random.random()
        if fate < self.chaos.lost_share:
            return
        if fate < self.chaos.lost_share + self.chaos.late_share:
            late = threading.Timer(self._random.uniform(0, 0.03), super().to_peer, (peer_id, message))
            late.daemon = True
            late.start()
            return
        super().to_peer(peer_id, message)
        if fate > 0.97 and not isinstance(message, TransferCancelled):
            super().to_peer(peer_id, message)


async def _served(engine: LiveEngine, client: Client) -> tuple[list[int], RequestOutcome]:
    """What the client got; its outcome comes last, and once."""
    await asyncio.sleep(client.arrival_s)
    request = client.request
    token_ids: list[int] = []
    outcome: RequestOutcome | None = None
    stream = engine.submit(request)
    if client.leaves_after == 0:
        engine.cancel(request.request_id)
    async for item in stream:
        assert outcome is None, "something came after the outcome"
        if isinstance(item, RequestOutcome):
            outcome = item
            continue
        token_ids.extend(item.token_ids)
        _check_logprobs(request, item)
        if client.leaves_after is not None and len(token_ids) >= client.leaves_after:
            engine.cancel(request.request_id)
        if client.pause_s:
            await asyncio.sleep(client.pause_s)
    assert outcome is not None
    return token_ids, outcome


def _check_logprobs(request: RequestSpec, delta: OutputDelta) -> None:
    assert request.sampling is not None
    asked = request.sampling.num_logprobs is not None
    assert tuple(each.token_ids[0] for each in delta.logprobs) == (delta.token_ids if asked else ())


def _is_quiet(driver: InstanceDriver) -> bool:
    """Nothing that belongs to a request is left with an instance."""
    transfers = driver._transfers
    kept = (
        driver._assigned,
        driver._reservations,
        driver._launched,
        driver._lookups._yet_to_plan,
        transfers._outgoing,
        transfers._reserved,
        transfers._incoming,
        driver._machine._requests,
        driver._machine._sender._by_transfer,
        driver._machine._sender._handovers,
    )
    return not any(kept) and driver._machine.num_unfinished == 0


async def _quiet(engine: LiveEngine, drivers: dict[InstanceId, InstanceDriver]) -> None:
    """What is still on its way between instances comes to its end without any further request."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + 15
    while True:
        living = [drivers[each.instance_id] for each in engine.snapshots() if not each.is_lost]
        if all(_is_quiet(driver) for driver in living):
            return
        if loop.time() > deadline_s:
            loud = {driver._config.instance_id: vars(driver) for driver in living if not _is_quiet(driver)}
            raise AssertionError(f"left over: {loud}")
        await asyncio.sleep(0.005)


def run_chaos(chaos: Chaos) -> bytes:
    """Run it, and check what every client got and what is left; the log."""
    file = io.BytesIO()
    devices: dict[InstanceId, ContentDevice] = {}

    def make(each: ExecutorSettings) -> StepExecutor:
        instance_id = each.instance.instance_id
        devices[instance_id] = ContentDevice(each, chaos.faults[instance_id], chaos.seed)
        return devices[instance_id]

    async def run() -> list[tuple[list[int], RequestOutcome]]:
        host = UnreliablePeers(chaos, make)
        engine = LiveEngine(chaos.cluster.deployment(), host, log=LiveLog(file, chaos.cluster.header()))
        await engine.start()
        for at_s, instance_id in chaos.kills:
            asyncio.get_running_loop().call_later(at_s, host.kill, instance_id)
        serving = asyncio.gather(*(_served(engine, client) for client in chaos.clients))
        if chaos.drain_s is not None:
            await asyncio.sleep(chaos.drain_s)
            await engine.drain(chaos.grace_s)
        got = await asyncio.wait_for(serving, LIVE_S_MAX)
        assert engine.num_unfinished == 0
        assert not any(engine._told.values())
        if chaos.drain_s is not None:
            return got
        await asyncio.sleep(max((at_s for at_s, _ in chaos.kills), default=0))
        await _quiet(engine, host.drivers())
        living = [each.instance_id for each in engine.snapshots() if not each.is_lost]
        await engine.drain(0)
        engine._control_plane.check()
        assert engine._control_plane.num_unfinished == 0
        for instance_id in living:
            assert not devices[instance_id].requests, f"{instance_id}'s device still knows requests"
        return got

    for client, (token_ids, outcome) in zip(chaos.clients, asyncio.run(run()), strict=True):
        _check_outcome(chaos, client, token_ids, outcome)
    return file.getvalue()


def _check_outcome(chaos: Chaos, client: Client, token_ids: list[int], outcome: RequestOutcome) -> None:
    expected, reason = undisturbed(client.request)
    assert token_ids == expected[: len(token_ids)]
    match outcome:
        case RequestOutcome(FinishReason.ABORT):
            has_left = client.leaves_after is not None and len(token_ids) >= client.leaves_after
            assert has_left or chaos.drain_s is not None
        case RequestOutcome(FinishReason.ERROR):
            assert any(faults.invalid_share for faults in chaos.faults.values())
        case RequestOutcome(None, refusal=Refusal.QUEUE_FULL):
            assert chaos.cluster.control_plane.queue_max == 1
            assert not token_ids
        case RequestOutcome(None, refusal=Refusal.UNAVAILABLE):
            assert chaos.drain_s is not None
            assert not token_ids
        case _:
            assert (token_ids, outcome.reason) == (expected, reason), (client, outcome)


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + NUM_SEEDS))
def test_whatever_fails_costs_time_only(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_transfers, "ASK_AGAIN_NS", 10_000_000)
    monkeypatch.setattr(kv_transfers, "PART_BYTES_MAX", 2 * 4)  # of `_instance`'s blocks two
    log = run_chaos(chaos_of(seed))
    assert replay_log(iter(log.splitlines(keepends=True)), "log").difference is None
