"""Replay of a log: the recorded events through fresh machines must give the recorded effects."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from random import Random

from sagellm.control_plane.control_plane import ControlPlane
from sagellm.core.identity import CONTROL_PLANE, InstanceId
from sagellm.core.log import HandledEvent, LogHeader, Polled, read_log
from sagellm.core.messages import Effect, Event, InstanceJoined
from sagellm.runtime.instance import Instance


@dataclass(frozen=True, slots=True)
class LogDifference:
    """Where two logs, or a log and its replay, part."""

    line: int
    now_ns: int
    machine: InstanceId
    recorded: str
    replayed: str


@dataclass(frozen=True, slots=True)
class LogReplayResult:
    num_events: int
    num_polls: int
    num_effects: int
    difference: LogDifference | None


def replay_log(lines: Iterator[bytes], name: str) -> LogReplayResult:
    """Feed the events to fresh machines, poll where the run polled, and compare. Raises `LogError`."""
    header, records = read_log(lines, name)
    machines = _make_machines(header)
    configs = {config.instance_id: config for config in header.instances}
    num_events = num_polls = num_effects = 0
    for line, record in enumerate(records, start=2):
        machine = machines[record.machine]
        if isinstance(record, HandledEvent):
            num_events += 1
            if isinstance(record.event, InstanceJoined):
                # It may have been lost before, and started again.
                machines[record.event.instance_id] = Instance(configs[record.event.instance_id])
            machine.handle(record.event, record.now_ns)  # type: ignore[arg-type]
            continue
        num_polls += 1
        num_effects += len(record.effects)
        effects: tuple[Effect, ...] = machine.poll(record.now_ns)
        if effects != record.effects:
            difference = _first_difference(line, record, effects)
            return LogReplayResult(num_events, num_polls, num_effects, difference)
    return LogReplayResult(num_events, num_polls, num_effects, None)


def _make_machines(header: LogHeader) -> dict[InstanceId, ControlPlane | Instance]:
    machines: dict[InstanceId, ControlPlane | Instance] = {
        CONTROL_PLANE: ControlPlane(header.control_plane, Random(header.seed))
    }
    machines.update((config.instance_id, Instance(config)) for config in header.instances)
    return machines


def _first_difference(line: int, record: Polled, replayed: tuple[Effect, ...]) -> LogDifference:
    for then, now in zip_longest(record.effects, replayed):
        if then != now:
            return LogDifference(line, record.now_ns, record.machine, _show(then), _show(now))
    raise AssertionError("the effects are equal")


def diff_logs(left: Iterator[bytes], left_name: str, right: Iterator[bytes], right_name: str) -> LogDifference | None:
    """The first record in which two logs differ; None where they are the same run. Raises `LogError`."""
    left_header, left_records = read_log(left, left_name)
    right_header, right_records = read_log(right, right_name)
    if left_header != right_header:
        return LogDifference(1, 0, CONTROL_PLANE, str(left_header), str(right_header))
    for line, (then, now) in enumerate(zip_longest(left_records, right_records), start=2):
        if then != now:
            some = then if then is not None else now
            assert some is not None
            return LogDifference(line, some.now_ns, some.machine, _show(then), _show(now))
    return None


def _show(what: Event | Effect | HandledEvent | Polled | None) -> str:
    text = "nothing" if what is None else str(what)
    return text if len(text) <= 2000 else text[:2000] + "..."
