"""The simulator's driver: carries out what the machines ask for, in simulated time.

Each instant goes the same way: every event of the instant is handed to its machine, then each machine
that heard something is polled once, then its effects are carried out. Messages between machines take
`SimCluster.message_latency_ns`, so nothing that a poll gives comes back in the same instant, and the
order in which machines are polled makes no difference.
"""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Final, assert_never

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
    HandoverEffect,
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
    StepFinished,
    StepProgressed,
    TransferKV,
)
from sagellm.core.metrics import MetricsFold
from sim.cluster import SimCluster, SimInstance
from sim.device import SimDevice, StepReport
from sim.driven_instance import DrivenInstance, DrivenMachine
from sim.environment import Call, CallQueue, FunctionCall
from sim.kept_news import KeptNews
from sim.mail import Mail
from sim.network import Network

# What nearly every step gives. Compiled code has constants at hand, while it looks imported names up each time.
_EMIT_TOKENS: Final = EmitTokens
_RUN_STEP: Final = RunStep
_REQUEST_FINISHED: Final = RequestFinished
_PREFILL_FINISHED: Final = PrefillFinished
_STEP_FINISHED: Final = StepFinished
_STEP_PROGRESSED: Final = StepProgressed


class SimDriver:
    """Runs one cluster. Hand it requests with `submit`, then `run`."""

    def __init__(self, cluster: SimCluster, *, seed: int, log: LogWriter | None = None, check: bool = False) -> None:
        self._cluster = cluster
        self._latency_ns = cluster.message_latency_ns
        self._calls = CallQueue()
        self._fold = MetricsFold()
        self._log = log
        self._check = check
        self._control_plane = ControlPlane(cluster.control_plane, Random(seed))
        self._front = DrivenMachine(CONTROL_PLANE)
        self._mail = Mail(self._latency_ns, self._calls, self._tell_control_plane, self._interrupt)
        self._kept_news = KeptNews()
        self._instances: dict[InstanceId, DrivenInstance] = {}
        self._network = Network(cluster.link, self._calls)
        self._dirty: list[DrivenMachine] = []
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
        return self._calls.now_ns

    # --- what the world does ---------------------------------------------------------------------------

    def at(self, at_ns: int, call: Callable[[], None]) -> None:
        """Call at that time; for cancellations and faults."""
        self._calls.call_at(at_ns, FunctionCall(lambda _: call()))

    def call_at(self, at_ns: int, call: Call) -> None:
        """Let the call happen at that time."""
        self._calls.call_at(at_ns, call)

    def submit(self, event: RequestArrived | RequestCancelled) -> None:
        """A client asks, or goes away, now."""
        now_ns = self.now_ns
        if isinstance(event, RequestArrived):
            self._fold.arrived(now_ns, event)
        self._tell_control_plane(event, now_ns)

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
        instance = self._instances[instance_id]
        if not instance.lost:
            self._dying.setdefault(instance_id, detection_ns)
            self._to_poll(instance)

    def run(self) -> None:
        """Until nothing is left to happen. Machines are polled when an instant has no event left."""
        calls = self._calls
        while calls.run_instant():
            if self._dirty:
                self._poll_dirty(calls.now_ns)
            if self._dying and not calls.is_more_due_now:
                self._lose_dying()
        if self._kept_news:
            last_ns = self._kept_news.arrivals_ns[-1]
            self._hand_out_news(last_ns)
            self._poll_dirty(last_ns)
            assert calls.is_empty, "news that could wait led to something"

    # --- instants ----------------------------------------------------------------------------------------

    def _tell_control_plane(self, event: ControlPlaneEvent, now_ns: int) -> None:
        """Hand it an event; it is polled when the instant is drained."""
        if self._kept_news:
            self._hand_out_news(now_ns)
        if self._log is not None:
            self._log.event(now_ns, CONTROL_PLANE, event)
        self._control_plane.handle(event, now_ns)
        self._to_poll(self._front)

    def _tell_instance(self, instance: DrivenInstance, event: InstanceEvent, now_ns: int) -> None:
        """The same for an instance."""
        if self._log is not None:
            self._log.event(now_ns, instance.instance_id, event)
        instance.machine.handle(event, now_ns)
        self._to_poll(instance)

    def _to_poll(self, machine: DrivenMachine) -> None:
        if not machine.is_dirty:
            machine.is_dirty = True
            self._dirty.append(machine)

    def _poll_dirty(self, now_ns: int) -> None:
        dirty, self._dirty = self._dirty, []
        for machine in dirty:
            machine.is_dirty = False
            if isinstance(machine, DrivenInstance):
                self._poll_instance(machine, now_ns)
            else:
                self._poll_control_plane(now_ns)

    # --- the control plane ---------------------------------------------------------------------------------

    def _poll_control_plane(self, now_ns: int) -> None:
        effects = self._control_plane.poll(now_ns)
        if self._log is not None:
            self._log.polled(now_ns, CONTROL_PLANE, effects)
        if self._check:
            self._control_plane.check()
        for effect in effects:
            self._perform_for_control_plane(effect, now_ns)
        if self._kept_news and not self._control_plane.news_can_wait:
            for message, at_ns in self._kept_news.take_all():
                self._mail.send_to_control_plane(message, at_ns)

    def _hand_out_news(self, until_ns: int) -> None:
        """Give the control plane what has arrived by now and could wait."""
        news = self._kept_news
        num_due = news.num_due(until_ns)
        for index in range(num_due):
            message, at_ns = news.messages[index], news.arrivals_ns[index]
            if self._log is not None:
                self._log.event(at_ns, CONTROL_PLANE, message)
            self._control_plane.handle(message, at_ns)
        if num_due:
            news.drop(num_due)
            self._to_poll(self._front)

    def _perform_for_control_plane(self, effect: ControlPlaneEffect, now_ns: int) -> None:
        match effect:
            case AssignRequest(instance_id=instance_id, request=request):
                self._fold.assigned(now_ns, effect)
                instance = self._instances[instance_id]
                instance.told_of[request.request_id] = None
                self._mail.send(instance, effect, now_ns, instance.request_overhead_ns)
            case ReserveKV(instance_id=instance_id, request=request):
                instance = self._instances[instance_id]
                instance.told_of[request.request_id] = None
                self._mail.send(instance, effect, now_ns)
            case AbortRequest() | ReleaseKV() | SourceLost() | DecodeHere():
                self._mail.send(self._instances[effect.instance_id], effect, now_ns)
            case RejectRequest(request_id=request_id) | RequestFinished(request_id=request_id):
                self._fold.observe(now_ns, effect)
                self._request_is_over(request_id, now_ns)
            case _:
                assert_never(effect)

    # --- instances -------------------------------------------------------------------------------------------

    def _join(self, instance: SimInstance) -> None:
        config = instance.config
        driven = DrivenInstance(instance)
        driven.device = SimDevice(
            instance.cost_model, config.steps_in_flight_max, self._calls, partial(self._step_reported, driven)
        )
        self._instances[config.instance_id] = driven
        self._tell_control_plane(
            InstanceJoined(
                config.instance_id,
                config.role,
                config.num_token_slots,
                config.max_num_seqs,
                config.max_num_batched_tokens,
            ),
            self.now_ns,
        )

    def _step_reported(self, instance: DrivenInstance, report: StepReport, now_ns: int) -> None:
        if type(report) is _STEP_FINISHED:
            self._fold.step_finished(now_ns, report)
        elif type(report) is _STEP_PROGRESSED:
            self._fold.step_progressed(now_ns, report)
        else:
            self._fold.observe(now_ns, report)
        self._tell_instance(instance, report, now_ns)

    def _poll_instance(self, instance: DrivenInstance, now_ns: int) -> None:
        if instance.lost:
            return
        effects = instance.machine.poll(now_ns)
        if self._log is not None:
            self._log.polled(now_ns, instance.instance_id, effects)
        if self._check:
            instance.machine.check()
        for effect in effects:
            self._perform_for_instance(instance, effect, now_ns)
        if instance.plans_late:
            self._arm(instance)

    def _perform_for_instance(self, instance: DrivenInstance, effect: InstanceEffect, now_ns: int) -> None:
        if type(effect) is _EMIT_TOKENS:
            self._fold.emitted(now_ns, effect)
        elif type(effect) is _RUN_STEP:
            self._fold.step_launched(now_ns, effect)
            instance.device.launch(effect, now_ns)
        elif type(effect) is _REQUEST_FINISHED:
            self._fold.finished(now_ns, effect)
            self._send_news(effect, now_ns)
            self._request_is_over(effect.request_id, now_ns)
        elif type(effect) is _PREFILL_FINISHED:
            self._send_news(effect, now_ns)
        else:
            assert not isinstance(effect, EmitTokens | RunStep | RequestFinished | PrefillFinished)
            self._perform_hand_over(instance, effect, now_ns)

    def _perform_hand_over(self, instance: DrivenInstance, effect: HandoverEffect, now_ns: int) -> None:
        match effect:
            case RequestMoved() | HandoverFailed():
                self._mail.send_to_control_plane(effect, now_ns + self._latency_ns)
            case KVReserved() | HandoverFinished() | ReleaseKV():
                self._mail.send(self._instances[effect.instance_id], effect, now_ns)
            case TransferKV():
                self._fold.observe(now_ns, effect)
                self._start_transfer(effect, now_ns)
                self._arm(instance)
            case CancelTransfer(transfer_id=transfer_id):
                self._arm(instance)
                if self._network.cancel(transfer_id, now_ns):
                    event = KVTransferFailed(transfer_id, "cancelled")
                    self._transfer_closed(instance.instance_id, event)
            case _:
                assert_never(effect)

    def _start_transfer(self, effect: TransferKV, now_ns: int) -> None:
        source_id, target_id = effect.source_instance_id, effect.target_instance_id
        if self._instances[target_id].lost:
            event = KVTransferFailed(effect.transfer_id, f"{target_id} is lost")
            self._transfer_closed(source_id, event)
            return

        def done() -> None:
            event = KVTransferred(effect.transfer_id)
            self._fold.observe(self.now_ns, event)
            self._interrupt(self._instances[source_id], event, self.now_ns)

        self._network.start(effect.transfer_id, source_id, target_id, effect.num_bytes, now_ns, done)

    def _transfer_closed(self, source_id: InstanceId, event: KVTransferFailed) -> None:
        """Tell the source, a message latency later."""
        self._fold.observe(self.now_ns, event)
        self._mail.send(self._instances[source_id], event, self.now_ns)

    def _arm(self, instance: DrivenInstance) -> None:
        """Poll at the machine's deadline, like the event that it is: a repeated step ends for it."""
        instance_id = instance.instance_id
        deadline_ns = instance.machine.deadline_ns()
        if deadline_ns is None or self._armed_ns.get(instance_id) == deadline_ns:
            return
        self._armed_ns[instance_id] = deadline_ns

        def wake(_: int) -> None:
            if self._armed_ns.get(instance_id) != deadline_ns or instance.lost:
                return
            del self._armed_ns[instance_id]
            if instance.machine.deadline_ns() == deadline_ns:
                instance.device.interrupt(deadline_ns)
                self._to_poll(instance)
            else:
                self._arm(instance)

        self._calls.call_at(max(deadline_ns, self.now_ns), FunctionCall(wake))

    # --- messages ------------------------------------------------------------------------------------------------

    def _interrupt(self, instance: DrivenInstance, event: InstanceEvent, now_ns: int) -> None:
        """Something reaches an instance from outside: a repeated step ends for it."""
        if not instance.lost:
            instance.device.interrupt(now_ns)
            self._tell_instance(instance, event, now_ns)

    def _send_news(self, message: PrefillFinished | RequestFinished, now_ns: int) -> None:
        """To the control plane, which may not need it before it hears of something else."""
        at_ns = now_ns + self._latency_ns
        if self._control_plane.news_can_wait:
            self._kept_news.keep(message, at_ns)
        else:
            self._mail.send_to_control_plane(message, at_ns)

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
            instance.lost = True
            if report is not None:
                self._emit_last_words(instance, report)
            self.fail_transfers(instance_id, f"{instance_id} is lost")
            delay_ns = max(detection_ns, 2 * self._cluster.message_latency_ns)
            self._calls.call_at(self.now_ns + delay_ns, FunctionCall(partial(self._report_loss, instance)))

    def _emit_last_words(self, instance: DrivenInstance, report: StepReport) -> None:
        """Clients have the tokens of every repetition that ended before the loss."""
        now_ns = self.now_ns
        self._fold.observe(now_ns, report)
        instance.machine.handle(report, now_ns)
        if self._log is not None:
            self._log.event(now_ns, instance.instance_id, report)
        effects = instance.machine.poll(now_ns)
        if self._log is not None:
            self._log.polled(now_ns, instance.instance_id, effects)
        for effect in effects:
            if isinstance(effect, EmitTokens):
                self._fold.observe(now_ns, effect)

    def _report_loss(self, instance: DrivenInstance, now_ns: int) -> None:
        records = self._fold.metrics.requests
        emitted: list[EmittedOutput] = []
        for request_id in instance.told_of:
            num_output_tokens = self._fold.num_emitted(request_id)
            if records[request_id].finish_reason is None and num_output_tokens:
                emitted.append(EmittedOutput(request_id, num_output_tokens))
        self._tell_control_plane(InstanceLost(instance.instance_id, tuple(emitted)), now_ns)
