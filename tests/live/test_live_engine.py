"""The engine on threads: devices that die, transfers that are never answered, and what clients are told."""

import ast
import asyncio
import io
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from both_drivers import STEP_NS, Cluster, instance, read, request

import sagellm.server.live
from backends.executor_settings import ExecutorSettings
from backends.null.executor import NullExecutor, made_up_token_id
from sagellm.core.config import ControlPlaneConfig, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.messages import Effect, EmitTokens, Event, KVReserved, RequestArrived, RequestFinished, RunStep
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.sampling import SamplingParameters
from sagellm.core.step_executor import StepExecutor, StepOutcome
from sagellm.log_replay import replay_log
from sagellm.server.engine import InstanceStatus, OutputDelta, Refusal, RequestOutcome
from sagellm.server.live.clock import LiveClock
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.instance_host import StartError
from sagellm.server.live.live_log import LiveLog
from sagellm.server.live.threaded_instances import ExecutorFactory, ThreadedInstances
from sagellm.server.live.wire import PeerMessage, ToInstance, TransferAnswer

Scenario = Callable[[LiveEngine], Awaitable[None]]


def make_null(settings: ExecutorSettings) -> StepExecutor:
    return NullExecutor(settings, lambda _: STEP_NS)


def serve(
    cluster: Cluster,
    scenario: Scenario,
    *,
    make_executor: ExecutorFactory = make_null,
    host_type: type[ThreadedInstances] = ThreadedInstances,
    observers: tuple["Recorder", ...] = (),
) -> None:
    file = io.BytesIO()
    settings = [each.settings for each in cluster.deployment().instances]

    async def run() -> None:
        host = host_type(settings, make_executor, DriverOptions(keeps_log=True, checks=True))
        log = LiveLog(file, cluster.header())
        engine = LiveEngine(cluster.deployment(), host, observers=observers, log=log)
        await engine.start()
        try:
            await asyncio.wait_for(scenario(engine), 20)
            assert engine.num_unfinished == 0
        finally:
            await engine.drain(0)
        engine._control_plane.check()
        assert engine._control_plane.num_unfinished == 0

    asyncio.run(run())
    assert replay_log(iter(file.getvalue().splitlines(keepends=True)), "log").difference is None


class Recorder:
    """An `EngineObserver`."""

    def __init__(self) -> None:
        self.records: list[Event | Effect] = []
        self.times_ns: list[int] = []
        self.statuses: list[InstanceStatus] = []

    def observe(self, now_ns: int, record: Event | Effect) -> None:
        self.times_ns.append(now_ns)
        self.records.append(record)

    def observe_status(self, now_ns: int, status: InstanceStatus) -> None:
        self.times_ns.append(now_ns)
        self.statuses.append(status)


# --- devices and peers that fail ---------------------------------------------------------------------------


class DyingExecutor(NullExecutor):
    """Its device breaks for good at its fifteenth step, which it never gives back."""

    num_left = 15

    def start(self, on_outcome: Callable[[StepOutcome], None], on_dead: Callable[[str], None]) -> None:
        super().start(on_outcome, on_dead)
        self._on_dead = on_dead

    def launch(self, step: RunStep) -> None:
        self.num_left -= 1
        if self.num_left > 0:
            super().launch(step)
        elif self.num_left == 0:
            self._on_dead("an illegal memory access was met")


class Restarted(ThreadedInstances):
    """Keeps what it is told to say to instances that are gone, as a host does that has started another one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.said: list[InstanceId] = []

    def send(self, instance_id: InstanceId, message: ToInstance) -> None:
        if instance_id in self._gone:
            self.said.append(instance_id)
        super().send(instance_id, message)


def test_nothing_is_said_to_an_instance_between_its_loss_and_its_return() -> None:
    """What peers that have not heard yet say to it is for the one that was lost."""

    async def scenario(engine: LiveEngine) -> None:
        host = engine._host
        assert isinstance(host, Restarted)
        stream = engine.submit(request("r", 20, 20))
        host.kill(InstanceId("d"))
        while not engine.snapshots()[1].is_lost:
            await asyncio.sleep(0)
        engine._post(InstanceId("d"), KVReserved(InstanceId("d"), RequestId("x"), InstanceId("p"), 1, 0, ()))
        assert (await read(stream))[1].reason is FinishReason.LENGTH
        assert not host.said

    cluster = Cluster((instance("p", Role.PREFILL), instance("d", Role.DECODE)))
    serve(cluster, scenario, host_type=Restarted)


def test_a_device_that_dies_takes_its_instance_and_no_request_with_it() -> None:
    """F26."""

    def make(settings: ExecutorSettings) -> StepExecutor:
        is_dying = settings.instance.instance_id == "a"
        return DyingExecutor(settings, lambda _: STEP_NS) if is_dying else make_null(settings)

    async def scenario(engine: LiveEngine) -> None:
        got = await asyncio.gather(*(read(engine.submit(request(name, 20, 40))) for name in range(4)))
        for token_ids, outcome in got:
            assert token_ids == [made_up_token_id(position) for position in range(40)]
            assert outcome == RequestOutcome(FinishReason.LENGTH)
        assert [each.is_lost for each in engine.snapshots()] == [True, False]
        assert engine.is_alive

    serve(Cluster((instance("a"), instance("b"))), scenario, make_executor=make)


class ForgetsAnswers(ThreadedInstances):
    """The first answer to every transfer is lost on the way."""

    def to_peer(self, peer_id: InstanceId, message: PeerMessage) -> None:
        if isinstance(message, TransferAnswer):
            lost = vars(self).setdefault("lost", set())
            if message.transfer_id not in lost:
                lost.add(message.transfer_id)
                return
        super().to_peer(peer_id, message)


def test_lost_answers_to_transfers_cost_time_only() -> None:
    """F10: the sender's time-out asks, and finds that all had arrived."""
    prefill = replace(instance("p", Role.PREFILL), transfer_timeout_ns=50_000_000)
    cluster = Cluster((prefill, instance("d", Role.DECODE)))

    async def scenario(engine: LiveEngine) -> None:
        got = await asyncio.gather(*(read(engine.submit(request(name, 40, 10))) for name in range(5)))
        for token_ids, outcome in got:
            assert token_ids == [made_up_token_id(position) for position in range(10)]
            assert outcome == RequestOutcome(FinishReason.LENGTH)
        assert all(not each.is_lost for each in engine.snapshots())

    serve(cluster, scenario, host_type=ForgetsAnswers)


def test_an_instance_that_cannot_start_says_why() -> None:
    def make(settings: ExecutorSettings) -> StepExecutor:
        if settings.instance.instance_id == "b":
            raise ValueError("the weights are not there")
        return make_null(settings)

    async def start() -> None:
        cluster = Cluster((instance("a"), instance("b")))
        settings = [each.settings for each in cluster.deployment().instances]
        with pytest.raises(StartError, match="b: the weights are not there"):
            await LiveEngine(cluster.deployment(), ThreadedInstances(settings, make, DriverOptions())).start()

    asyncio.run(start())


# --- what clients and observers get ------------------------------------------------------------------------


def test_a_reader_that_is_late_gets_everything_at_once() -> None:
    async def scenario(engine: LiveEngine) -> None:
        stream = engine.submit(request("r", 20, 30))
        while engine.num_unfinished:
            await asyncio.sleep(0.01)
        items = [item async for item in stream]
        assert [type(item) for item in items] == [OutputDelta, RequestOutcome]
        assert items[0] == OutputDelta(tuple(made_up_token_id(each) for each in range(30)), (), 0)

    serve(Cluster((instance("a"),)), scenario)


def test_every_token_has_its_logprobs_even_when_requests_are_preempted() -> None:
    async def scenario(engine: LiveEngine) -> None:
        specs = [
            replace_sampling(request(name, 20, 60, first_id=100 * name), None if name % 2 else name)
            for name in range(5)
        ]
        await asyncio.gather(*(check_logprobs(engine, spec) for spec in specs))

    serve(Cluster((instance("a", num_blocks=10, max_num_seqs=8),)), scenario)


def replace_sampling(spec: RequestSpec, num_logprobs: int | None) -> RequestSpec:
    return RequestSpec(
        spec.request_id,
        0,
        spec.num_prompt_tokens,
        spec.max_output_tokens,
        prompt_token_ids=spec.prompt_token_ids,
        sampling=SamplingParameters(num_logprobs=num_logprobs),
    )


async def check_logprobs(engine: LiveEngine, spec: RequestSpec) -> None:
    assert spec.sampling is not None
    num_tokens = 0
    async for item in engine.submit(spec):
        if isinstance(item, OutputDelta):
            num_tokens += len(item.token_ids)
            if spec.sampling.num_logprobs is None:
                assert item.logprobs == ()
            else:
                assert tuple(each.token_ids[0] for each in item.logprobs) == item.token_ids
    assert num_tokens == spec.max_output_tokens


def test_cached_tokens_are_told_with_the_first_delta() -> None:
    async def scenario(engine: LiveEngine) -> None:
        for expected in (0, 32):
            deltas = [item async for item in engine.submit(request(expected, 40)) if isinstance(item, OutputDelta)]
            assert [delta.num_cached_tokens for delta in deltas] == [expected] * len(deltas)

    serve(Cluster((instance("a"),)), scenario)


def test_a_stop_string_found_by_the_client_side_ends_with_stop() -> None:
    async def scenario(engine: LiveEngine) -> None:
        outcomes = []
        async for item in engine.submit(request("r", 20, 500)):
            if isinstance(item, RequestOutcome):
                outcomes.append(item)
            else:
                engine.cancel(RequestId("r"), FinishReason.STOP)
        assert outcomes == [RequestOutcome(FinishReason.STOP)]

    serve(Cluster((instance("a"),)), scenario)


def test_a_full_queue_is_told_from_a_request_that_is_too_long() -> None:
    async def scenario(engine: LiveEngine) -> None:
        got = await asyncio.gather(*(read(engine.submit(request(name, 20, 20))) for name in range(9)))
        refusals = [outcome.refusal for _, outcome in got]
        assert refusals.count(Refusal.QUEUE_FULL) == refusals.count(None) + 3 == 6
        _, outcome = await read(engine.submit(request("r", 90, 20)))
        assert outcome.refusal is Refusal.IMPOSSIBLE

    config = ControlPlaneConfig(queue_max=2, dispatch_tokens_max=1, max_model_len=100)
    serve(Cluster((instance("a", max_num_seqs=1),), config), scenario)


def test_a_request_that_lost_its_instance_too_often_is_not_told_of_a_full_queue(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def make(settings: ExecutorSettings) -> StepExecutor:
        is_dying = settings.instance.instance_id == "a"
        return DyingExecutor(settings, lambda _: STEP_NS) if is_dying else make_null(settings)

    async def scenario(engine: LiveEngine) -> None:
        token_ids, outcome = await read(engine.submit(request("r", 20, 40)))
        assert 0 < len(token_ids) < 15
        assert outcome.refusal is Refusal.UNAVAILABLE
        assert outcome.message == "its instance was lost, once too often"
        assert engine.is_alive

    config = ControlPlaneConfig(attempts_max=1, routing="round_robin")
    serve(Cluster((instance("a"), instance("b")), config), scenario, make_executor=make)
    assert "a is lost: an illegal memory access was met" in caplog.text


def test_an_id_in_use_is_refused() -> None:
    async def scenario(engine: LiveEngine) -> None:
        first = engine.submit(request("r"))
        with pytest.raises(ValueError, match="'r' is in use"):
            engine.submit(request("r"))
        await read(first)
        await read(engine.submit(request("r")))

    serve(Cluster((instance("a"),)), scenario)


def test_an_observer_hears_all_in_order_and_counts_add_up() -> None:
    recorder = Recorder()

    async def scenario(engine: LiveEngine) -> None:
        await asyncio.gather(*(read(engine.submit(request(name, 20, 7, first_id=50 * name))) for name in range(6)))

    serve(Cluster((instance("p", Role.PREFILL), instance("d", Role.DECODE))), scenario, observers=(recorder,))
    assert recorder.times_ns == sorted(recorder.times_ns)
    seen: dict[str, int] = {}
    for record in recorder.records:
        if isinstance(record, RequestArrived):
            seen[record.request.request_id] = 0
        elif isinstance(record, EmitTokens):
            for request_id in record.request_ids:
                seen[request_id] += len(record.ends_ns)
        elif isinstance(record, RequestFinished):
            assert seen.pop(record.request_id) == 7
    assert not seen
    last = {status.instance_id: status for status in recorder.statuses}
    assert last[InstanceId("p")].num_output_tokens == 6
    assert last[InstanceId("d")].num_output_tokens == 36
    assert last[InstanceId("p")].num_prompt_tokens == last[InstanceId("p")].num_prefix_query_tokens == 120
    assert all(status.num_running == status.num_blocks_in_use == 0 for status in last.values())
    assert all(status.core_ns > 0 for status in last.values())


@pytest.mark.parametrize("fault", [RequestArrived, EmitTokens])
def test_a_fault_in_the_front_ends_every_stream(caplog: pytest.LogCaptureFixture, fault: type) -> None:
    class Faulty(Recorder):
        def observe(self, now_ns: int, record: Event | Effect) -> None:
            if isinstance(record, fault):
                raise ArithmeticError("on purpose")

    async def run() -> None:
        cluster = Cluster((instance("a"),))
        settings = [each.settings for each in cluster.deployment().instances]
        host = ThreadedInstances(settings, make_null, DriverOptions())
        engine = LiveEngine(cluster.deployment(), host, observers=(Faulty(),))
        await engine.start()
        streams = [engine.submit(request(name, 20, 1000)) for name in ("good", "bad")]
        for _, outcome in await asyncio.gather(*(read(stream) for stream in streams)):
            assert outcome == RequestOutcome(FinishReason.ERROR, "the server broke down")
        assert not engine.is_alive
        await engine.drain(0)

    asyncio.run(run())
    assert "on purpose" in caplog.text


# --- time --------------------------------------------------------------------------------------------------


def test_the_clock_never_goes_back() -> None:
    readings = iter([5, 3, 7])
    clock = LiveClock(lambda: next(readings))
    assert [clock.now_ns(), clock.now_ns(), clock.now_ns()] == [5, 5, 7]


def test_nothing_live_reads_the_wall_clock() -> None:
    """F34: a clock that is set makes no difference to anybody who does not look at it."""
    (folder,) = sagellm.server.live.__path__
    names = {
        f"{path.name}: {ast.unparse(node)}"
        for path in Path(folder).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom | ast.Import) and ("time" in ast.unparse(node))
    }
    wall_clocks = ("datetime", "import time", "localtime", "gmtime", "from time import time")
    assert names
    assert not [name for name in names if any(word in name for word in wall_clocks)]


def test_control_plane_config_reaches_the_machine() -> None:
    async def scenario(engine: LiveEngine) -> None:
        _, outcome = await read(engine.submit(request("r", 90, 20)))
        assert outcome.reason is None
        assert "max_model_len 100" in outcome.message
        assert outcome.refusal is Refusal.IMPOSSIBLE

    serve(Cluster((instance("a"),), ControlPlaneConfig(max_model_len=100)), scenario)
