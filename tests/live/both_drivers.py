"""One script of arrivals, cancellations and losses, run by the simulator or live, and what the log says of it.

Both write the same kind of log, so what a test asserts it reads from there, and never knows who drove.
"""

import asyncio
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

from backends.executor_settings import ExecutorSettings
from backends.null.executor import NullExecutor, made_up_token_id
from sagellm.core.config import ControlPlaneConfig, InstanceConfig, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.log import HandledEvent, LogHeader, LogWriter, Polled, read_log
from sagellm.core.messages import (
    AssignRequest,
    EmitTokens,
    RejectRequest,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    RequestMoved,
    RunStep,
)
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.cost_model.link import Link
from sagellm.cost_model.step_cost import StepCost, StepFeatures
from sagellm.log_replay import replay_log
from sagellm.server.engine import OutputDelta, RequestOutcome
from sagellm.server.live.deployment import DeployedInstance, Deployment
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.live_log import LiveLog
from sagellm.server.live.request_stream import RequestStream
from sagellm.server.live.threaded_instances import ThreadedInstances
from sim.cluster import SimCluster, SimInstance
from sim.driver import SimDriver

STEP_NS = 1_000_000
LIVE_S_MAX = 20.0


@dataclass(frozen=True)
class Cluster:
    """What is driven."""

    instances: tuple[InstanceConfig, ...]
    control_plane: ControlPlaneConfig = field(default=ControlPlaneConfig())

    def header(self) -> LogHeader:
        return LogHeader("test", "script", 0, self.control_plane, self.instances)

    def deployment(self, backend: str = "none") -> Deployment:
        settings = [ExecutorSettings(config, "made-up", backend) for config in self.instances]
        return Deployment(
            "test", "made-up", self.control_plane, tuple(DeployedInstance(each, backend) for each in settings)
        )


def instance(name: str, role: Role = Role.MIXED, num_blocks: int = 512, **limits: int) -> InstanceConfig:
    return InstanceConfig(InstanceId(name), num_blocks, role, kv_bytes_per_token=1, repeat_max=1, **limits)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Script:
    """What the world does, each with its time in milliseconds."""

    arrivals: tuple[tuple[float, RequestSpec], ...]
    cancels: tuple[tuple[float, RequestId, FinishReason], ...] = ()
    losses: tuple[tuple[float, InstanceId], ...] = ()


def request(
    name: str | int, num_prompt_tokens: int = 20, num_output_tokens: int = 5, priority: int = 0, first_id: int = 0
) -> RequestSpec:
    return RequestSpec(
        RequestId(str(name)),
        0,
        num_prompt_tokens,
        num_output_tokens,
        priority,
        prompt_token_ids=tuple(range(first_id, first_id + num_prompt_tokens)),
    )


class RunRecords:
    """A run's log, read."""

    def __init__(self, log: bytes) -> None:
        self.log = log
        _, records = read_log(iter(log.splitlines(keepends=True)), "log")
        self.records: list[HandledEvent | Polled] = list(records)
        self.effects = [
            (each.machine, effect) for each in self.records if isinstance(each, Polled) for effect in each.effects
        ]

    @cached_property
    def assigned(self) -> list[tuple[RequestId, InstanceId]]:
        """Who was sent where, in order."""
        return [
            (effect.request.request_id, effect.instance_id)
            for _, effect in self.effects
            if isinstance(effect, AssignRequest)
        ]

    @cached_property
    def num_tokens(self) -> dict[RequestId, int]:
        counts: dict[RequestId, int] = {}
        for _, effect in self.effects:
            if isinstance(effect, EmitTokens):
                for request_id in effect.request_ids:
                    counts[request_id] = counts.get(request_id, 0) + len(effect.ends_ns)
        return counts

    @cached_property
    def first_token_order(self) -> list[RequestId]:
        return list(self.num_tokens)

    @cached_property
    def outcomes(self) -> dict[RequestId, list[FinishReason | str]]:
        """Every end that each request had: how it finished, or why it was rejected."""
        ends: dict[RequestId, list[FinishReason | str]] = {}
        for _, effect in self.effects:
            if isinstance(effect, RequestFinished | RejectRequest):
                ends.setdefault(effect.request_id, []).append(effect.reason)
        return ends

    @cached_property
    def num_cached_tokens(self) -> dict[RequestId, int]:
        """Tokens of each request that its first chunk found computed."""
        cached: dict[RequestId, int] = {}
        for _, effect in self.effects:
            if isinstance(effect, RunStep):
                for chunk in effect.plan.chunks:
                    cached.setdefault(chunk.request_id, chunk.num_computed_tokens)
        return cached

    @cached_property
    def moves(self) -> list[RequestId]:
        return [effect.request_id for _, effect in self.effects if isinstance(effect, RequestMoved)]


Run = Callable[[Cluster, Script], RunRecords]


# --- simulated ---------------------------------------------------------------------------------------------


class OneMillisecond:
    """Every step takes that long."""

    status = "estimate"
    request_overhead_ns = 0

    def step_cost(self, features: StepFeatures) -> StepCost:
        return StepCost(STEP_NS * 1_000_000, 0, 0)


def run_simulated(cluster: Cluster, script: Script) -> RunRecords:
    file = io.BytesIO()
    log = LogWriter(cluster.header(), file)
    link = Link("fast", 1_000, 100.0, "estimate", "")
    instances = tuple(SimInstance(config, OneMillisecond()) for config in cluster.instances)
    driver = SimDriver(SimCluster("test", cluster.control_plane, instances, link), seed=0, log=log, check=True)
    for at_ms, spec in script.arrivals:
        driver.at(round(at_ms * 1e6), partial(driver.submit, RequestArrived(spec)))
    for at_ms, request_id, reason in script.cancels:
        event = RequestCancelled(request_id, reason)
        driver.at(round(at_ms * 1e6), lambda event=event: driver.submit(event))  # type: ignore[misc]
    for at_ms, instance_id in script.losses:
        driver.at(round(at_ms * 1e6), lambda lost_id=instance_id: driver.lose(lost_id, 5_000_000))  # type: ignore[misc]
    driver.run()
    log.close()
    return RunRecords(file.getvalue())


# --- live --------------------------------------------------------------------------------------------------


def run_live(cluster: Cluster, script: Script) -> RunRecords:
    """In this process, each instance a thread; the streams must show what the log says, and nothing be left over."""
    file = io.BytesIO()
    streamed = asyncio.run(_run_live(cluster, script, file))
    records = RunRecords(file.getvalue())
    for request_id, (token_ids, outcome) in streamed.items():
        assert token_ids == [made_up_token_id(position) for position in range(len(token_ids))]
        assert len(token_ids) == records.num_tokens.get(request_id, 0)
        (end,) = records.outcomes[request_id]
        assert end == outcome.reason or outcome.message == end or end == "cancelled by the client"
    result = replay_log(iter(records.log.splitlines(keepends=True)), "log")
    assert result.difference is None
    return records


async def _run_live(
    cluster: Cluster, script: Script, file: io.BytesIO
) -> dict[RequestId, tuple[list[int], RequestOutcome]]:
    deployment = cluster.deployment()
    settings = [each.settings for each in deployment.instances]
    host = ThreadedInstances(
        settings, lambda each: NullExecutor(each, lambda _: STEP_NS), DriverOptions(keeps_log=True, checks=True)
    )
    engine = LiveEngine(deployment, host, log=LiveLog(file, cluster.header()))
    await engine.start()
    loop = asyncio.get_running_loop()
    start_s = loop.time() + 0.005
    readers: dict[RequestId, asyncio.Task[tuple[list[int], RequestOutcome]]] = {}

    def submit(specs: list[RequestSpec]) -> None:
        for spec in specs:
            readers[spec.request_id] = asyncio.ensure_future(read(engine.submit(spec)))

    waves: dict[float, list[RequestSpec]] = {}
    for at_ms, spec in script.arrivals:
        waves.setdefault(at_ms, []).append(spec)
    for at_ms, specs in waves.items():
        loop.call_at(start_s + at_ms / 1e3, submit, specs)
    for at_ms, request_id, reason in script.cancels:
        loop.call_at(start_s + at_ms / 1e3, engine.cancel, request_id, reason)
    for at_ms, instance_id in script.losses:
        loop.call_at(start_s + at_ms / 1e3, host.kill, instance_id)
    while len(readers) < len(script.arrivals):
        await asyncio.sleep(0.001)
    streamed = {each: await asyncio.wait_for(reader, LIVE_S_MAX) for each, reader in readers.items()}
    assert engine.num_unfinished == 0
    await engine.drain(1)
    engine._control_plane.check()
    assert engine._control_plane.num_unfinished == 0
    assert all(each.status.num_blocks_in_use == 0 for each in engine.snapshots() if not each.is_lost)
    return streamed


async def read(stream: RequestStream) -> tuple[list[int], RequestOutcome]:
    """All of a stream; it gives its outcome last, and once."""
    token_ids: list[int] = []
    outcome: RequestOutcome | None = None
    async for item in stream:
        assert outcome is None
        if isinstance(item, OutputDelta):
            token_ids.extend(item.token_ids)
        else:
            outcome = item
    assert outcome is not None
    return token_ids, outcome


DRIVERS: dict[str, Run] = {"sim": run_simulated, "live": run_live}
