"""The simulator's driver: carries out what the machines ask for, in simulated time.

Each instant goes the same way: every event of the instant is handed to its machine, then each machine
that heard something is polled once, then its effects are carried out. Messages between machines take
`SimCluster.message_latency_ns`, so nothing that a poll gives comes back in the same instant, and the
order in which machines are polled makes no difference.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from random import Random
from typing import assert_never

import simpy

from sagellm.control_plane.control_plane import ControlPlane
from sagellm.core.identity import CONTROL_PLANE, InstanceId
from sagellm.core.log import LogWriter
from sagellm.core.messages import (
    AbortRequest,
    AssignRequest,
    CancelTransfer,
    ControlPlaneEffect,
    ControlPlaneEvent,
    DecodeHere,
    EmittedOutput,
    EmitTokens,
    HandoverFailed,
    HandoverFinished,
    InstanceEffect,
    InstanceEvent,
    InstanceJoined,
    InstanceLost,
    KVReserved,
    KVTransferFailed,
    KVTransferred,
    PrefillFinished,
    RejectRequest,
    ReleaseKV,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    RequestMoved,
    ReserveKV,
    RunStep,
    SourceLost,
    TransferKV,
)
from sagellm.core.metrics import MetricsFold
from sim.cluster import SimCluster, SimInstance
from sim.device import SimDevice, StepReport
from sim.driven_instance import DrivenInstance
from sim.environment import CallEnvironment
from sim.network import Network

_Message = ControlPlaneEvent | InstanceEvent


class SimDriver:
    """Runs one cluster. Hand it requests with `submit`, then `run`."""

    def __init__(self, cluster: SimCluster, *, seed: int, log: LogWriter | None = None, check: bool = False) -> None:
        self._cluster = cluster
        self._env = CallEnvironment(initial_time=0)
        self._fold = MetricsFold()
        self._observe = self._fold.observe
        self._metrics_handlers = self._fold.handlers
        self._log = log
        self._check = check
        self._control_plane = ControlPlane(cluster.control_plane, Random(seed))
        self._instances: dict[InstanceId, DrivenInstance] = {}
        self._network = Network(cluster.link, self._env.call_at)
        self._dirty: dict[InstanceId, None] = {}
        self._kept_news: deque[tuple[int, _Message]] = deque()  # for the control plane, in order of arrival
        self._outgoing: dict[tuple[InstanceId, int], list[_Message]] = {}
        self._armed_ns: dict[InstanceId, int] = {}
        self._dying: dict[InstanceId, int] = {}
        self.on_request_over: Callable[[str, int], None] | None = None
        for instance in cluster.instances:
            self._join(instance)

    @property
    def metrics(self) -> MetricsFold:
        return self._fold

    @property
    def now_ns(self) -> int:
        now_ns: int = self._env.now  # type: ignore[assignment]
        return now_ns

    # --- what the world does ---------------------------------------------------------------------------

    def at(self, at_ns: int, call: Callable[[], None]) -> None:
        """Call at that time; for arrivals, cancellations and faults."""
        self._env.call_at(at_ns, lambda _: call())

    def submit(self, event: RequestArrived | RequestCancelled) -> None:
        """A client asks, or goes away, now."""
        now_ns = self.now_ns
        self._observe(now_ns, event)
        self._deliver(CONTROL_PLANE, event, now_ns)

    def fail_next_step(self, instance_id: InstanceId) -> None:
        """The execution under way ends well; the one after it fails at its end."""
        self._instances[instance_id].device.fail_next(self.now_ns)

    def fail_transfers(self, instance_id: InstanceId, reason: str = "injected fault") -> None:
        """All transfers under way from and to the instance break now."""
        for transfer_id, source_id in self._network.transfers_of(instance_id):
            self._network.cancel(transfer_id, self.now_ns)
            self._transfer_closed(source_id, KVTransferFailed(transfer_id, reason))

    def set_slowdown(self, instance_id: InstanceId, slowdown: int) -> None:
        """From its next step on the instance takes so many times as long."""
        self._instances[instance_id].device.slow_down(slowdown, self.now_ns)

    def lose(self, instance_id: InstanceId, detection_ns: int = 1_000_000_000) -> None:
        """The instance dies when this instant is over; the control plane hears of it ``detection_ns`` later."""
        if not self._instances[instance_id].lost:
            self._dying.setdefault(instance_id, detection_ns)
            self._dirty[instance_id] = None

    def run(self) -> None:
        """Until nothing is left to happen. Machines are polled when an instant has no event left."""
        self._run_events()
        if self._kept_news:
            last_ns = self._kept_news[-1][0]
            self._hand_out_news(last_ns)
            self._poll_dirty(last_ns)

    def _run_events(self) -> None:
        env = self._env
        step, peek = env.step, env.peek
        with suppress(simpy.core.EmptySchedule):
            while True:
                step()
                if self._dirty:
                    now_ns: int = env.now  # type: ignore[assignment]
                    if peek() > now_ns:
                        self._poll_dirty(now_ns)
                        if self._dying:
                            self._lose_dying()

    # --- instants ----------------------------------------------------------------------------------------

    def _deliver(self, machine_id: InstanceId, event: _Message, now_ns: int) -> None:
        """Hand an event to a machine; it is polled when the instant is drained."""
        if self._kept_news and machine_id == CONTROL_PLANE:
            self._hand_out_news(now_ns)
        if self._log is not None:
            self._log.event(now_ns, machine_id, event)
        if machine_id == CONTROL_PLANE:
            self._control_plane.handle(event, now_ns)  # type: ignore[arg-type]
        else:
            self._instances[machine_id].machine.handle(event, now_ns)  # type: ignore[arg-type]
        self._dirty[machine_id] = None

    def _poll_dirty(self, now_ns: int) -> None:
        dirty, self._dirty = self._dirty, {}
        for machine_id in dirty:
            if machine_id == CONTROL_PLANE:
                self._poll_control_plane(now_ns)
            else:
                self._poll_instance(machine_id, now_ns)

    # --- the control plane ---------------------------------------------------------------------------------

    def _poll_control_plane(self, now_ns: int) -> None:
        effects = self._control_plane.poll(now_ns)
        if self._log is not None:
            self._log.polled(now_ns, CONTROL_PLANE, effects)
        if self._check:
            self._control_plane.check()
        for effect in effects:
            self._observe(now_ns, effect)
            self._perform_for_control_plane(effect, now_ns)

        if self._kept_news and not self._control_plane.news_can_wait:
            while self._kept_news:
                self._arrive_at(CONTROL_PLANE, *self._kept_news.popleft())

    def _hand_out_news(self, until_ns: int) -> None:
        """Give the control plane what has arrived by now and could wait."""
        news = self._kept_news
        while news and news[0][0] <= until_ns:
            at_ns, message = news.popleft()
            if self._log is not None:
                self._log.event(at_ns, CONTROL_PLANE, message)
            self._control_plane.handle(message, at_ns)  # type: ignore[arg-type]
            self._dirty[CONTROL_PLANE] = None

    def _perform_for_control_plane(self, effect: ControlPlaneEffect, now_ns: int) -> None:
        match effect:
            case AssignRequest(instance_id=instance_id, request=request):
                instance = self._instances[instance_id]
                instance.told_of[request.request_id] = None
                self._send(instance_id, effect, now_ns, instance.request_overhead_ns)
            case ReserveKV(instance_id=instance_id, request=request):
                self._instances[instance_id].told_of[request.request_id] = None
                self._send(instance_id, effect, now_ns)
            case AbortRequest() | ReleaseKV() | SourceLost() | DecodeHere():
                self._send(effect.instance_id, effect, now_ns)
            case RejectRequest(request_id=request_id) | RequestFinished(request_id=request_id):
                self._request_is_over(request_id, now_ns)
            case _:
                assert_never(effect)

    # --- instances -------------------------------------------------------------------------------------------

    def _join(self, instance: SimInstance) -> None:
        config = instance.config
        sim_instance = DrivenInstance(instance)
        sim_instance.device = SimDevice(
            instance.cost_model,
            config.steps_in_flight_max,
            self._env.call_at,
            partial(self._step_reported, config.instance_id),
        )
        self._instances[config.instance_id] = sim_instance
        self._deliver(
            CONTROL_PLANE,
            InstanceJoined(
                config.instance_id,
                config.role,
                config.num_token_slots,
                config.max_num_seqs,
                config.max_num_batched_tokens,
            ),
            self.now_ns,
        )

    def _step_reported(self, instance_id: InstanceId, report: StepReport, now_ns: int) -> None:
        self._observe(now_ns, report)
        self._deliver(instance_id, report, now_ns)

    def _poll_instance(self, instance_id: InstanceId, now_ns: int) -> None:
        instance = self._instances[instance_id]
        if instance.lost:
            return
        effects = instance.machine.poll(now_ns)
        if self._log is not None:
            self._log.polled(now_ns, instance_id, effects)
        if self._check:
            instance.machine.check()
        handlers = self._metrics_handlers
        for effect in effects:
            handler = handlers.get(type(effect))
            if handler is not None:
                handler(now_ns, effect)
            self._perform_for_instance(instance, effect, now_ns)

    def _perform_for_instance(self, instance: DrivenInstance, effect: InstanceEffect, now_ns: int) -> None:
        match effect:
            case EmitTokens():
                pass
            case RunStep():
                instance.device.launch(effect, now_ns)
            case RequestFinished(request_id=request_id):
                self._send(CONTROL_PLANE, effect, now_ns)
                self._request_is_over(request_id, now_ns)
            case PrefillFinished() | RequestMoved() | HandoverFailed():
                self._send(CONTROL_PLANE, effect, now_ns)
            case KVReserved() | HandoverFinished() | ReleaseKV():
                self._send(effect.instance_id, effect, now_ns)
            case TransferKV():
                self._start_transfer(effect, now_ns)
                self._arm(instance)
            case CancelTransfer(transfer_id=transfer_id):
                self._arm(instance)
                if self._network.cancel(transfer_id, now_ns):
                    event = KVTransferFailed(transfer_id, "cancelled")
                    self._transfer_closed(instance.machine.config.instance_id, event)
            case _:
                assert_never(effect)

    def _start_transfer(self, effect: TransferKV, now_ns: int) -> None:
        source_id, target_id = effect.source_instance_id, effect.target_instance_id
        if self._instances[target_id].lost:
            event = KVTransferFailed(effect.transfer_id, f"{target_id} is lost")
            self._transfer_closed(source_id, event)
            return

        def done() -> None:
            self._observe(self.now_ns, KVTransferred(effect.transfer_id))
            self._tell(source_id, KVTransferred(effect.transfer_id), self.now_ns)

        self._network.start(effect.transfer_id, source_id, target_id, effect.num_bytes, now_ns, done)

    def _transfer_closed(self, source_id: InstanceId, event: KVTransferFailed) -> None:
        """Tell the source, a message latency later."""
        self._observe(self.now_ns, event)
        self._send(source_id, event, self.now_ns)

    def _arm(self, instance: DrivenInstance) -> None:
        """Poll at the machine's deadline, like the event that it is: a repeated step ends for it."""
        instance_id = instance.instance_id
        deadline_ns = instance.machine.deadline_ns()
        if deadline_ns is None or self._armed_ns.get(instance_id) == deadline_ns:
            return
        self._armed_ns[instance_id] = deadline_ns

        def wake(_: object) -> None:
            if self._armed_ns.get(instance_id) != deadline_ns or instance.lost:
                return
            del self._armed_ns[instance_id]
            if instance.machine.deadline_ns() == deadline_ns:
                instance.device.interrupt(deadline_ns)
                self._dirty[instance_id] = None
            else:
                self._arm(instance)

        self._env.call_at(max(deadline_ns, self.now_ns), wake)

    # --- messages ------------------------------------------------------------------------------------------------

    def _send(self, to: InstanceId, message: _Message, now_ns: int, extra_ns: int = 0) -> None:
        """A message arrives later than it was sent, and not before one that was sent to the same machine earlier."""
        at_ns = now_ns + self._cluster.message_latency_ns + extra_ns
        if to != CONTROL_PLANE:
            instance = self._instances[to]
            at_ns = instance.message_clock_ns = max(at_ns, instance.message_clock_ns)
        elif self._control_plane.news_can_wait and isinstance(message, PrefillFinished | RequestFinished):
            self._kept_news.append((at_ns, message))
            return
        self._arrive_at(to, at_ns, message)

    def _arrive_at(self, to: InstanceId, at_ns: int, message: _Message) -> None:
        together = self._outgoing.get((to, at_ns))
        if together is not None:
            together.append(message)
            return
        messages = self._outgoing[to, at_ns] = [message]

        def arrive(_: object) -> None:
            del self._outgoing[to, at_ns]
            for each in messages:
                self._tell(to, each, at_ns)

        self._env.call_at(at_ns, arrive)

    def _tell(self, to: InstanceId, message: _Message, now_ns: int) -> None:
        if to != CONTROL_PLANE:
            instance = self._instances[to]
            if instance.lost:
                return
            instance.device.interrupt(now_ns)
        self._deliver(to, message, now_ns)

    def _request_is_over(self, request_id: str, now_ns: int) -> None:
        if self.on_request_over is not None:
            self.on_request_over(request_id, now_ns)

    # --- losses ----------------------------------------------------------------------------------------------------

    def _lose_dying(self) -> None:
        """After the last poll of the instant, so that all that ended by now is out, however it is reported."""
        dying, self._dying = self._dying, {}
        for instance_id, detection_ns in dying.items():
            instance = self._instances[instance_id]
            report = instance.device.halt(self.now_ns)
            if report is not None:
                self._emit_last_words(instance_id, instance, report)
            instance.lost = True
            self.fail_transfers(instance_id, f"{instance_id} is lost")
            delay_ns = max(detection_ns, 2 * self._cluster.message_latency_ns)
            self._env.call_at(self.now_ns + delay_ns, lambda _, lost_id=instance_id: self._report_loss(lost_id))  # type: ignore[misc]

    def _emit_last_words(self, instance_id: InstanceId, instance: DrivenInstance, report: StepReport) -> None:
        """Clients have the tokens of every repetition that ended before the loss."""
        now_ns = self.now_ns
        self._observe(now_ns, report)
        instance.machine.handle(report, now_ns)
        if self._log is not None:
            self._log.event(now_ns, instance_id, report)
        effects = instance.machine.poll(now_ns)
        if self._log is not None:
            self._log.polled(now_ns, instance_id, effects)
        for effect in effects:
            if isinstance(effect, EmitTokens):
                self._observe(now_ns, effect)

    def _report_loss(self, instance_id: InstanceId) -> None:
        records = self._fold.metrics.requests
        emitted: list[EmittedOutput] = []
        for request_id in self._instances[instance_id].told_of:
            record = records[request_id]  # type: ignore[index]
            num_output_tokens = self._fold.num_emitted(record.request.request_id)
            if record.finish_reason is None and num_output_tokens:
                emitted.append(EmittedOutput(record.request.request_id, num_output_tokens))
        self._deliver(CONTROL_PLANE, InstanceLost(instance_id, tuple(emitted)), self.now_ns)
