"""Faults of real processes: what is killed, hung or left alone costs time, and nothing else."""

import asyncio
import io
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from both_drivers import Cluster, instance, read, request
from msgspec import structs

from backends.executor_settings import ExecutorSettings
from backends.null.executor import made_up_token_id
from sagellm.core.config import ControlPlaneConfig, HandoverStart, InstanceConfig, Role
from sagellm.core.identity import InstanceId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.sampling import SamplingParameters
from sagellm.log_replay import replay_log
from sagellm.server.engine import OutputDelta, Refusal, RequestOutcome
from sagellm.server.live import supervisor
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.instance_host import StartError
from sagellm.server.live.live_log import LiveLog
from sagellm.server.live.supervisor import InstanceProcesses, _InstanceProcess
from sagellm.server.live.wire import InstanceDied

NUM_BLOCKS = 4096
Scenario = Callable[[LiveEngine, InstanceProcesses], Awaitable[None]]


def serve(
    cluster: Cluster, scenario: Scenario, *, silence_s_max: float = 30.0, restart_after_s: float = 3600.0
) -> None:
    """Run the scenario on processes; then nothing is left over, and the log replays."""
    file = io.BytesIO()
    host = InstanceProcesses(
        [each.settings for each in cluster.deployment().instances],
        DriverOptions(keeps_log=True, checks=True),
        silence_s_max=silence_s_max,
        restart_after_s=restart_after_s,
    )

    async def run() -> None:
        engine = LiveEngine(cluster.deployment(), host, log=LiveLog(file, cluster.header()))
        await engine.start()
        try:
            await asyncio.wait_for(scenario(engine, host), 20)
            assert engine.num_unfinished == 0
        finally:
            await engine.drain(0)
        engine._control_plane.check()
        assert engine._control_plane.num_unfinished == 0
        assert all(each.status.num_blocks_in_use == 0 for each in engine.snapshots() if not each.is_lost)

    asyncio.run(run())
    for process_id in process_ids(host).values():
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
    assert not host._folder.exists()
    assert replay_log(iter(file.getvalue().splitlines(keepends=True)), "log").difference is None


def process_ids(host: InstanceProcesses) -> dict[InstanceId, int]:
    return {each.instance_id: each.process.pid for each in host._processes.values() if each.process is not None}


def big(name: str, role: Role = Role.MIXED) -> InstanceConfig:
    return instance(name, role, NUM_BLOCKS)


def expected(spec: RequestSpec) -> list[int]:
    return [made_up_token_id(position) for position in range(spec.max_output_tokens)]


async def read_some(engine: LiveEngine, spec: RequestSpec, num_tokens: int, then: Callable[[], None]) -> list[int]:
    """All tokens of a request; ``then`` happens when so many are there."""
    token_ids: list[int] = []
    is_done = False
    async for item in engine.submit(spec):
        if isinstance(item, OutputDelta):
            token_ids.extend(item.token_ids)
            if len(token_ids) >= num_tokens and not is_done:
                is_done = True
                then()
        else:
            assert item == RequestOutcome(FinishReason.LENGTH)
    assert is_done
    return token_ids


async def lost(engine: LiveEngine, index: int) -> None:
    """The front hears of it; all requests may be over by then."""
    while not engine.snapshots()[index].is_lost:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("roles", "killed", "num_tokens"),
    [
        ((Role.MIXED, Role.MIXED), 0, 60),
        ((Role.PREFILL, Role.DECODE), 0, 1),
        ((Role.PREFILL, Role.DECODE), 1, 60),
    ],
)
def test_a_killed_instance_costs_no_token_and_repeats_none(
    roles: tuple[Role, ...], killed: int, num_tokens: int
) -> None:
    """F1, F2, F4, F5."""
    config = ControlPlaneConfig(handover_start=HandoverStart.STREAMED)
    cluster = Cluster(tuple(big(f"i{index}", role) for index, role in enumerate(roles)), config)
    specs = [request(name, 200 + name, 250, first_id=1000 * name) for name in range(6)]

    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        victim = process_ids(host)[InstanceId(f"i{killed}")]
        others = [asyncio.ensure_future(read(engine.submit(spec))) for spec in specs[1:]]
        token_ids = await read_some(engine, specs[0], num_tokens, lambda: os.kill(victim, signal.SIGKILL))
        assert token_ids == expected(specs[0])
        for spec, (got, outcome) in zip(specs[1:], await asyncio.gather(*others), strict=True):
            assert outcome == RequestOutcome(FinishReason.LENGTH)
            assert got == expected(spec)
        await lost(engine, killed)
        assert [each.is_lost for each in engine.snapshots()] == [index == killed for index in range(len(roles))]
        assert engine.is_alive

    serve(cluster, scenario)


def test_lost_instances_are_started_again_and_serve_as_before() -> None:
    cluster = Cluster((big("p", Role.PREFILL), big("d", Role.DECODE)))

    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        for victim in (InstanceId("d"), InstanceId("p")):
            before = process_ids(host)
            specs = [request(f"{victim}-{name}", 50 + name, 300, first_id=1000 * name) for name in range(3)]
            others = [asyncio.ensure_future(read(engine.submit(spec))) for spec in specs[1:]]
            token_ids = await read_some(engine, specs[0], 20, partial(os.kill, before[victim], signal.SIGKILL))
            assert token_ids == expected(specs[0])
            for spec, (got, outcome) in zip(specs[1:], await asyncio.gather(*others), strict=True):
                assert (got, outcome) == (expected(spec), RequestOutcome(FinishReason.LENGTH))
            while process_ids(host) == before or any(each.is_lost for each in engine.snapshots()):
                await asyncio.sleep(0.01)
            after = process_ids(host)
            assert {name for name in before if before[name] != after[name]} == {victim}
        # Those that came back know each other: KV goes from the new one to the new one.
        num_tokens = {each.instance_id: each.status.num_output_tokens for each in engine.snapshots()}
        await read(engine.submit(request("last", 40, 10)))
        while any(each.status.num_output_tokens == num_tokens[each.instance_id] for each in engine.snapshots()):
            await asyncio.sleep(0.01)

    serve(cluster, scenario, restart_after_s=0.0)


def test_the_pause_before_an_instance_that_never_lasts_grows() -> None:
    async def run() -> None:
        process = _InstanceProcess.__new__(_InstanceProcess)
        process.instance_id, process.listens, process.listens_s = InstanceId("a"), False, 0.0
        host = InstanceProcesses([], DriverOptions())
        host._loop = asyncio.get_running_loop()
        pauses_s = [host._pause_s(process) for _ in range(8)]
        assert pauses_s == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
        process.listens, process.listens_s = True, host._loop.time() - 301
        assert host._pause_s(process) == 2.0

    asyncio.run(run())


def test_without_instances_requests_end_and_the_engine_says_so() -> None:
    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        streams = [engine.submit(request(name, 20, 20_000)) for name in range(3)]
        reading = [asyncio.ensure_future(read(stream)) for stream in streams]
        while not streams[0].output_token_ids:
            await asyncio.sleep(0)
        host.kill(InstanceId("only"))
        for _, outcome in await asyncio.gather(*reading):
            assert outcome == RequestOutcome(None, "no instance is left to serve it", Refusal.UNAVAILABLE)
        assert not engine.is_alive
        _, outcome = await read(engine.submit(request("late")))
        assert outcome.reason is None

    serve(Cluster((big("only"),)), scenario)


def test_one_instance_that_cannot_start_stops_the_others(tmp_path: Path) -> None:
    """A folder without weights: what the process says of it is the error, and nobody stays behind."""
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    good = ExecutorSettings(big("a"), "made-up", "none")
    bad = ExecutorSettings(big("b"), str(tmp_path), "cpu")
    host = InstanceProcesses([good, bad], DriverOptions())
    cluster = Cluster((big("a"), big("b")))
    with pytest.raises(StartError, match=r"^b: .*config\.json"):
        asyncio.run(LiveEngine(cluster.deployment(), host).start())
    for process_id in process_ids(host).values():
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_a_start_that_is_called_off_does_not_wait_for_those_who_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody there reads what it is told, so asking it to leave would be waiting for nothing."""
    monkeypatch.setattr(supervisor, "STOP_S", 3600.0)
    host = InstanceProcesses([ExecutorSettings(big("a"), "made-up", "none")], DriverOptions())

    async def run() -> None:
        starting = asyncio.ensure_future(LiveEngine(Cluster((big("a"),)).deployment(), host).start())
        while not host._processes:
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(starting, 60)

    asyncio.run(run())
    for process_id in process_ids(host).values():
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_words_to_an_instance_that_has_just_died_hold_nobody_up() -> None:
    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        reading = [asyncio.ensure_future(read(engine.submit(request(name)))) for name in range(4)]
        # The front speaks to it in its next turn, and can only hear of its death after that.
        os.kill(process_ids(host)[InstanceId("a")], signal.SIGKILL)
        time.sleep(0.3)
        for token_ids, outcome in await asyncio.gather(*reading):
            assert token_ids == expected(request("any"))
            assert outcome == RequestOutcome(FinishReason.LENGTH)

    serve(Cluster((big("a"), big("b"))), scenario)


def test_an_instance_that_hangs_is_ended() -> None:
    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        victim = process_ids(host)[InstanceId("a")]
        spec = request("r", 20, 150)
        token_ids = await read_some(engine, spec, 10, lambda: os.kill(victim, signal.SIGSTOP))
        assert token_ids == expected(spec)
        await lost(engine, 0)

    serve(Cluster((big("a"), big("b"))), scenario, silence_s_max=2.0)


def test_a_device_that_is_reported_dead_takes_its_process_along() -> None:
    """F26: the process need not manage to leave by itself."""

    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        spec = request("r", 20, 150)
        process = host._processes[InstanceId("a")]
        died = InstanceDied(InstanceId("a"), "an illegal memory access was met")
        assert await read_some(engine, spec, 10, lambda: host._heard(process, died)) == expected(spec)
        await lost(engine, 0)

    serve(Cluster((big("a"), big("b"))), scenario)


def test_logprobs_and_cached_tokens_cross_processes() -> None:
    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        for num_cached in (0, 32):
            plain = request(num_cached, 40, 20)
            spec = structs.replace(plain, sampling=SamplingParameters(num_logprobs=2))
            async for item in engine.submit(spec):
                if isinstance(item, OutputDelta):
                    assert tuple(each.token_ids[0] for each in item.logprobs) == item.token_ids
                    assert all(len(each.token_ids) == 3 for each in item.logprobs)
                    assert item.num_cached_tokens == num_cached

    serve(Cluster((big("a"),)), scenario)


def test_clients_that_leave_at_any_token_leave_nothing() -> None:
    """F14, F15: also when the last token is on its way."""
    cluster = Cluster((big("p", Role.PREFILL), big("d", Role.DECODE)))

    async def leave(engine: LiveEngine, spec: RequestSpec, num_tokens: int) -> RequestOutcome:
        got = 0
        if num_tokens == 0:
            asyncio.get_running_loop().call_soon(engine.cancel, spec.request_id)
        async for item in engine.submit(spec):
            if isinstance(item, RequestOutcome):
                return item
            got += len(item.token_ids)
            if got >= num_tokens:
                engine.cancel(spec.request_id)
        raise AssertionError("no outcome came")

    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        outcomes = await asyncio.gather(
            *(leave(engine, request(name, 30, 60, first_id=100 * name), name) for name in range(64))
        )
        assert {outcome.reason for outcome in outcomes} <= {FinishReason.ABORT, FinishReason.LENGTH}
        assert outcomes[0].reason is FinishReason.ABORT
        assert outcomes[-1].reason is FinishReason.LENGTH

    serve(cluster, scenario)


def test_draining_takes_nothing_new_and_lets_end_what_runs() -> None:
    """F35, as far as the engine goes."""

    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        running = [asyncio.ensure_future(read(engine.submit(request(name, 20, 100)))) for name in range(3)]
        draining = asyncio.ensure_future(engine.drain(30))
        await asyncio.sleep(0)
        assert engine.is_draining
        _, refused = await read(engine.submit(request("late")))
        assert refused == RequestOutcome(None, "the server is being stopped", Refusal.UNAVAILABLE)
        await draining
        for token_ids, outcome in await asyncio.gather(*running):
            assert outcome == RequestOutcome(FinishReason.LENGTH)
            assert len(token_ids) == 100

    serve(Cluster((big("a"),)), scenario)


def test_draining_aborts_what_takes_too_long() -> None:
    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        stream = engine.submit(request("endless", 20, 60_000))
        endless = asyncio.ensure_future(read(stream))
        while not stream.output_token_ids:
            await asyncio.sleep(0)
        await engine.drain(0)
        assert (await endless)[1] == RequestOutcome(FinishReason.ABORT)

    serve(Cluster((big("a"),)), scenario)


def test_many_requests_in_a_row_leave_nothing() -> None:
    """Step by step the same as for the first request, and blocks as at the start."""
    cluster = Cluster((instance("p", Role.PREFILL, 64), instance("d", Role.DECODE, 64)))

    async def scenario(engine: LiveEngine, host: InstanceProcesses) -> None:
        for name in range(25):
            spec = request(name, 30, 6, first_id=name)
            assert await read(engine.submit(spec)) == (expected(spec), RequestOutcome(FinishReason.LENGTH))

    serve(cluster, scenario)
