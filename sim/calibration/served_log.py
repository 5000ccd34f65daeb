"""The log of a server, read for calibration: its steps with their periods, and its requests' times.

A log holds several replays one after the other, told apart by the nonce in the names that the client
gives its requests (``sagellm.load_client``).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sagellm.core.identity import CONTROL_PLANE, InstanceId, RequestId
from sagellm.core.log import HandledEvent, Polled, read_log
from sagellm.core.messages import AssignRequest, EmitTokens, RequestArrived, RunStep, StepFinished
from sagellm.core.plan import StepPlan
from sim.calibration.timed_steps import StepTimer, TimedStep

_NAME = re.compile(r"replay-(?P<nonce>[^-]+)-(?P<index>\d+)-")


@dataclass(slots=True)
class LoggedRequest:
    """When a request got where, on the clock that front and instances share; 0 where it never got there."""

    arrived_ns: int  # at the control plane
    assigned_ns: int = 0  # by it
    received_ns: int = 0  # by the instance
    first_end_ns: int = 0  # end of the step that gave the first token
    last_end_ns: int = 0

    @property
    def inner_ttft_ns(self) -> int:
        """What a simulation without any overhead would show: queueing and computing, and nothing on the way."""
        return (self.first_end_ns - self.received_ns) + (self.assigned_ns - self.arrived_ns)


@dataclass(slots=True)
class LoggedReplay:
    """One replay: its steps in order, and its requests by their number in the trace."""

    steps: list[TimedStep] = field(default_factory=list)
    requests: dict[int, LoggedRequest] = field(default_factory=dict)


def read_replays(path: Path) -> dict[str, LoggedReplay]:
    """The replays of a log by nonce, in their order. A step belongs to the replay of its first request.

    Raises:
        ValueError: the file is no log, or cannot be read.
    """
    try:
        with path.open("rb") as lines:
            _, records = read_log(lines, str(path))
            return replays_of(records)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the log of a server") from error


def plan_lead_ns_of(path: Path) -> int:
    """How long before the end of a step the log's instances planned the next one; the longest, where they differ."""
    try:
        with path.open("rb") as lines:
            header, _ = read_log(lines, str(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the log of a server") from error
    return max((instance.plan_lead_ns for instance in header.instances), default=0)


def replays_of(records: Iterable[HandledEvent | Polled]) -> dict[str, LoggedReplay]:
    """The same of records."""
    reader = _Reader()
    for record in records:
        if isinstance(record, HandledEvent):
            reader.handled(record)
        else:
            reader.polled(record)
    return reader.replays


class _Reader:
    def __init__(self) -> None:
        self.replays: dict[str, LoggedReplay] = {}
        self._timers: dict[InstanceId, StepTimer] = {}
        self._heard_ns: dict[InstanceId, int] = {}  # when an instance last heard of a step's end
        self._nonces: dict[tuple[InstanceId, int], str] = {}  # of steps in flight
        self._requests: dict[RequestId, LoggedRequest] = {}

    def handled(self, record: HandledEvent) -> None:
        match record.event:
            case StepFinished(step_id=step_id) as event:
                step = self._timer(record.machine).finished(event)
                self._heard_ns[record.machine] = record.now_ns
                nonce = self._nonces.pop((record.machine, step_id), None)
                if nonce is not None:
                    self._replay(nonce).steps.append(step)
            case RequestArrived(request=request):
                name = _NAME.search(request.request_id)
                if name is not None:
                    logged = self._requests[request.request_id] = LoggedRequest(record.now_ns)
                    self._replay(name["nonce"]).requests[int(name["index"])] = logged
            case AssignRequest(request=request):
                if request.request_id in self._requests:
                    self._requests[request.request_id].received_ns = record.now_ns
            case _:
                return

    def polled(self, record: Polled) -> None:
        for effect in record.effects:
            match effect:
                case RunStep():
                    self._launched(record, effect)
                case AssignRequest(request=request) if record.machine == CONTROL_PLANE:
                    if request.request_id in self._requests:
                        self._requests[request.request_id].assigned_ns = record.now_ns
                case EmitTokens():
                    self._emitted(effect)
                case _:
                    continue

    def _launched(self, record: Polled, step: RunStep) -> None:
        timer = self._timer(record.machine)
        has_news = self._heard_ns.get(record.machine) == record.now_ns
        timer.launched(step, record.now_ns, follows=has_news or timer.num_in_flight > 0)
        nonce = _nonce_of(step.plan)
        if nonce is not None:
            self._nonces[record.machine, step.step_id] = nonce

    def _emitted(self, emit: EmitTokens) -> None:
        for request_id in emit.request_ids:
            logged = self._requests.get(request_id)
            if logged is not None:
                logged.first_end_ns = logged.first_end_ns or emit.ends_ns[0]
                logged.last_end_ns = emit.ends_ns[-1]

    def _timer(self, machine: InstanceId) -> StepTimer:
        return self._timers.setdefault(machine, StepTimer())

    def _replay(self, nonce: str) -> LoggedReplay:
        return self.replays.setdefault(nonce, LoggedReplay())


def _nonce_of(plan: StepPlan) -> str | None:
    request_ids = plan.decode_request_ids or tuple(chunk.request_id for chunk in plan.chunks)
    name = _NAME.search(request_ids[0]) if request_ids else None
    return None if name is None else name["nonce"]
