"""Random clusters, traces and faults from one seed, and a recorder of all that a run decides."""

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

from sagellm.core.config import ControlPlaneConfig, HandoverStart, InstanceConfig, Role
from sagellm.core.identity import InstanceId, RequestId, StepId
from sagellm.core.messages import (
    AssignRequest,
    DecodeHere,
    Effect,
    EmitTokens,
    Event,
    HandoverFailed,
    KVReserved,
    KVTransferFailed,
    KVTransferred,
    PrefillFinished,
    RejectRequest,
    RequestFinished,
    RequestMoved,
    ReserveKV,
    RunStep,
    StepFailed,
    StepFinished,
    StepProgressed,
    TransferKV,
)
from sagellm.core.request import FinishReason, LatencySLO
from sagellm.core.run_metrics import RequestRecord
from sagellm.cost_model.link import Link
from sagellm.cost_model.step_cost import StepCost, StepFeatures
from sim.arrivals import Arrivals
from sim.cluster import SimCluster, SimInstance
from sim.driver import SimDriver
from sim.faults import ClientCancels, Fault, InstanceDies, InstanceSlows, StepFails, TransfersFail, arm_faults
from traces.request_trace import Trace, TraceRequest

DECISIONS = (
    AssignRequest,
    ReserveKV,
    DecodeHere,
    RequestFinished,
    RejectRequest,
    RequestMoved,
    HandoverFailed,
    PrefillFinished,
)


NVLINK = Link("nvlink", 10_000, 300.0, "spec", "")


@dataclass(frozen=True)
class LinearCost:
    """A price that grows with decodes, their context and prompt tokens, all in femtoseconds."""

    step_fs: int = 4_300_000_000_000
    decode_fs: int = 12_000_000_000
    context_token_fs: int = 13_000_000
    prompt_token_fs: int = 21_000_000_000
    host_fs: int = 400_000_000_000
    linear_repeat_max: int = 1 << 60
    request_overhead_ns: int = 2_000_000
    status: str = "estimate"

    def step_cost(self, features: StepFeatures) -> StepCost:
        num_decodes = features.num_decode_seqs
        device_fs = (
            self.step_fs
            + num_decodes * self.decode_fs
            + features.num_decode_context_tokens * self.context_token_fs
            + sum(num_tokens for num_tokens, _ in features.chunks) * self.prompt_token_fs
        )
        return StepCost(device_fs, num_decodes * self.context_token_fs, self.host_fs, self.linear_repeat_max)


def make_cluster(
    *configs: InstanceConfig,
    cost: LinearCost = LinearCost(),
    link: Link = NVLINK,
    message_latency_ns: int = 50_000,
    **control_plane: object,
) -> SimCluster:
    """A cluster of these instances, all of one price."""
    return SimCluster(
        "test",
        ControlPlaneConfig(**control_plane),  # type: ignore[arg-type]
        tuple(SimInstance(config, cost) for config in configs),
        link,
        message_latency_ns,
    )


def without_fast_forward(cluster: SimCluster) -> SimCluster:
    instances = tuple(replace(i, config=replace(i.config, repeat_max=1)) for i in cluster.instances)
    return replace(cluster, instances=instances)


def random_cluster(rng: Random) -> SimCluster:
    is_disaggregated = rng.random() < 0.5
    if is_disaggregated:
        roles = [Role.PREFILL] * rng.choice([1, 2]) + [Role.DECODE] * rng.choice([1, 2])
        roles += [Role.MIXED] * rng.choice([0, 0, 1])
    else:
        roles = [Role.MIXED] * rng.choice([1, 1, 2, 3])
    max_num_seqs = rng.choice([2, 4, 16])
    host_fs = rng.choice([0, 400_000_000_000, 400_000_000_000, 9_000_000_000_000])
    cost = LinearCost(
        context_token_fs=rng.choice([13_000_000, 13_000_000, 0, 900_000_001]),
        host_fs=host_fs,
        linear_repeat_max=rng.choice([1 << 60, 1 << 60, 1, 2, 5]),
        request_overhead_ns=rng.choice([0, 2_000_000]),
    )
    num_blocks = rng.choice([26, 26, 40, 60, 200])
    common = InstanceConfig(
        InstanceId("any"),
        num_blocks=num_blocks,
        kv_bytes_per_token=100_000,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([16, 64, 512]),
        max_num_chunks=rng.choice([0, 0, 1]),
        max_chunk_tokens=rng.choice([0, 0, 32]),
        steps_in_flight_max=rng.choice([1, 2]),
        prefix_caching=rng.random() < 0.8,
        watermark_blocks=rng.choice([0, 2]),
        transfer_timeout_ns=rng.choice([30_000_000_000, 30_000_000_000, 3_000_000]),
    )
    configs = [replace(common, instance_id=InstanceId(f"i{i}"), role=role) for i, role in enumerate(roles)]
    return make_cluster(
        *configs,
        cost=cost,
        link=Link("link", 10_000, rng.choice([300.0, 1.0]), "spec", ""),
        strategy=rng.choice(["fifo", "slo_aware", "adaptive", "priority"]),
        routing=rng.choice(["round_robin", "least_loaded", "power_of_two", "prefix_affinity"]),
        dispatch_tokens_max=rng.choice([100, 1000, 1_000_000]),
        handover_start=rng.choice([HandoverStart.AT_END, HandoverStart.STREAMED]),
        disaggregate_min_tokens=rng.choice([0, 0, 30]),
        queue_max=rng.choice([10, 100_000]),
    )


def planned_late(rng: Random, cluster: SimCluster) -> SimCluster:
    """The same with a lead, of any length; more often than not such that steps are repeated all the same."""
    lead_ns = rng.choice(
        [1, 400_001, 400_002, 410_000, 1_000_000, 2_000_000, 2_000_000, 4_400_000, 6_000_000, 50_000_000]
    )
    cost_changes = rng.choice([{}, {"host_fs": 0, "linear_repeat_max": 1 << 60}, {"host_fs": 400_000_000_000}])
    changes = rng.choice([{}, {"num_blocks": 200, "max_num_seqs": 16, "max_num_batched_tokens": 512}])
    depth = rng.choice([1, 2, 2, 2, 2])
    instances = tuple(
        replace(
            each,
            config=replace(each.config, plan_lead_ns=lead_ns, steps_in_flight_max=depth, **changes),
            cost_model=replace(each.cost_model, **cost_changes),  # type: ignore[type-var]
        )
        for each in cluster.instances
    )
    return replace(cluster, instances=instances)


def random_trace(rng: Random) -> Trace:
    at_ns = 0
    requests: list[TraceRequest] = []
    shares = rng.random() < 0.5
    for index in range(rng.choice([3, 20, 50])):
        at_ns += rng.choice([0, 0, 1_000_000, 20_000_000, 300_000_000]) + rng.randrange(3)
        num_prompt = rng.choice([1, 5, 16, 17, 40, 100, 300])
        has_content = shares and rng.random() < 0.7
        previous = rng.randrange(index) if index and rng.random() < 0.1 else None
        requests.append(
            TraceRequest(
                at_ns,
                num_prompt,
                rng.choice([1, 2, 3, 20, 100]),
                content_ids=tuple(range(-(-num_prompt // 16))) if has_content else (),
                priority=rng.randrange(3),
                previous=previous,
                gap_ns=rng.choice([0, 50_000_000]),
            )
        )
    return Trace("random", tuple(requests), 16)


def random_faults(rng: Random, cluster: SimCluster, trace: Trace) -> tuple[Fault, ...]:
    end_ns = trace.requests[-1].arrival_ns + 1_000_000_000
    faults: list[Fault] = []
    for _ in range(rng.randrange(1, 7)):
        at_ns = rng.randrange(end_ns)
        instance_id = rng.choice(cluster.instances).config.instance_id
        match rng.choice(["cancel", "cancel", "cancel", "step", "step", "transfers", "die", "slow"]):
            case "cancel":
                index = rng.randrange(len(trace.requests))
                at_ns = trace.requests[index].arrival_ns + rng.choice([0, 1, 3_000_000, rng.randrange(2_000_000_000)])
                faults.append(ClientCancels(at_ns, RequestId(str(index))))
            case "step":
                faults.append(StepFails(at_ns, instance_id))
            case "transfers":
                faults += [TransfersFail(at_ns + i * 1_000_000, instance_id) for i in range(rng.choice([1, 30]))]
            case "die":
                faults.append(InstanceDies(at_ns, instance_id, rng.choice([0, 1_000_000_000])))
            case "slow":
                faults.append(InstanceSlows(at_ns, instance_id, rng.choice([1, 10])))
    return tuple(faults)


class Recording:
    """What a run decided, taken from its log, without what may differ between fast-forward on and off.

    That is: in which portions steps were reported, and polls that gave nothing.
    """

    def __init__(self) -> None:
        self.tokens: dict[RequestId, list[int]] = {}
        self.decisions: list[tuple[int, str]] = []
        self.counts: Counter[str] = Counter()
        self.events: list[tuple[int, InstanceId, Event]] = []
        self.effects: list[tuple[int, InstanceId, Effect]] = []
        self._num_quiet: dict[tuple[InstanceId, StepId], int] = {}  # repetitions of steps that may end quietly
        self._repeated_late: set[tuple[InstanceId, StepId]] = set()  # with plans that are held back
        self._last_end_ns: dict[InstanceId, int] = {}
        self.driver: SimDriver

    def event(self, now_ns: int, machine: InstanceId, event: Event) -> None:
        self.events.append((now_ns, machine, event))
        self.counts[type(event).__name__] += 1
        match event:
            case StepFinished(ends_ns=ends_ns) | StepProgressed(ends_ns=ends_ns):
                self.counts["repeated"] += len(ends_ns) > 1
                self.counts[f"{type(event).__name__} of {min(len(ends_ns), 3)}"] += 1
                if isinstance(event, StepProgressed) and (machine, event.step_id) in self._repeated_late:
                    is_late = now_ns > (ends_ns[-1] if ends_ns else self._last_end_ns.get(machine, 0))
                    when = "late" if is_late else "at once"
                    self.counts[f"planned {when} behind {min(len(ends_ns), 3)}"] += 1
                if ends_ns:
                    self._last_end_ns[machine] = ends_ns[-1]
                if isinstance(event, StepFinished) and len(ends_ns) == self._num_quiet.get((machine, event.step_id)):
                    is_cut = any(who == machine and at_ns > ends_ns[-2] for at_ns, who, _ in self.events[-9:-1])
                    self.counts["ended quietly, with news" if is_cut else "ended quietly"] += 1
            case StepFailed():
                self.decisions.append((now_ns, f"{event.instance_id} {event.reason}"))
            case KVTransferred() | KVTransferFailed():
                self.decisions.append((now_ns, str(event)))

    def polled(self, now_ns: int, machine: InstanceId, effects: tuple[Effect, ...]) -> None:
        instance = self.driver._instances.get(machine)
        for effect in effects:
            if instance is not None and instance.lost and not isinstance(effect, EmitTokens):
                continue  # Its last words come with what it would have done next.
            self.effects.append((now_ns, machine, effect))
            self.counts[f"-> {type(effect).__name__}"] += 1
            match effect:
                case EmitTokens():
                    for request_id in effect.request_ids:
                        self.tokens.setdefault(request_id, []).extend(effect.ends_ns)
                case RunStep(plan=plan):
                    self.decisions += [(now_ns, f"{machine} {chunk}") for chunk in plan.chunks]
                    self.decisions += [(now_ns, f"{machine} preempts {r}") for r in plan.preempted_request_ids]
                    self.counts["preempted"] += len(plan.preempted_request_ids)
                    if effect.plan_lead_ns:
                        self._repeated_late.add((machine, effect.step_id))
                    if effect.ends_quietly:
                        self._num_quiet[machine, effect.step_id] = effect.repeat_max
                case KVReserved() | TransferKV():
                    # Which of the free blocks are taken may differ, how many may not.
                    ids = effect.block_ids if isinstance(effect, KVReserved) else effect.source_block_ids
                    what = f"{machine} {type(effect).__name__} {effect.request_id}: {len(ids)} blocks"
                    self.decisions.append((now_ns, what))
                case _ if isinstance(effect, DECISIONS):
                    self.decisions.append((now_ns, str(effect)))

    def close(self) -> str:
        return ""

    @property
    def requests(self) -> dict[RequestId, RequestRecord]:
        return self.driver.metrics.metrics.requests


def record(
    cluster: SimCluster,
    trace: Trace,
    *,
    seed: int = 0,
    faults: tuple[Fault, ...] = (),
    slo: LatencySLO | None = None,
    check: bool = True,
) -> Recording:
    """Run, with all invariants checked after every poll unless told otherwise."""
    recording = Recording()
    recording.driver = driver = SimDriver(cluster, seed=seed, log=recording, check=check)  # type: ignore[arg-type]
    Arrivals(driver, trace, slo or LatencySLO(), None).start()
    arm_faults(driver, faults)
    driver.run()
    return recording


def assert_all_is_over(recording: Recording) -> None:
    """I1, I3, I5, I8 and I12 as they show from outside, once a run is over."""
    for request_id, request in recording.requests.items():
        token_times = recording.tokens.get(request_id, [])
        ends = (request.finish_reason is not None) + (request.reject_reason is not None)
        assert ends == 1, f"I3, I12: {request_id} has {ends} ends"
        assert token_times == sorted(token_times), f"I5: {request_id}"
        assert len(token_times) <= request.request.max_output_tokens, f"I5: {request_id} got too many tokens"
        if request.finish_reason is FinishReason.LENGTH:
            assert len(token_times) == request.request.max_output_tokens, f"I5: {request_id} lacks tokens"
    assert recording.driver._control_plane.num_unfinished == 0
    for instance in recording.driver._instances.values():
        if not instance.lost:
            assert instance.machine.num_unfinished == 0, "I8"
            instance.machine.check()
