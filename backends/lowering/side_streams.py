"""Launches on several streams of an accelerator, with events where one stream needs another's results."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from backends.lowering.launches import Launch, StepState


class _StreamStep(NamedTuple):
    run: Callable[[StepState], None]
    dead: tuple[int, ...]
    stream: torch.Stream | None  # None: the caller's
    waits: tuple[torch.Event, ...]
    done: torch.Event | None  # None: no other stream waits for it


class SideStreams:
    """One stream for each that the launches name; ``compute`` is whatever stream the caller is on.

    Side streams begin behind what the caller's stream has been given, and the caller's stream goes on
    behind them all, so the step is one piece of work to everybody else, and may be captured in a device graph.
    """

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self._device = device
        names = {launch.stream for launch in launches} - {"compute"}
        streams = {name: torch.Stream(device) for name in sorted(names)}
        events = {name: torch.Event(device) for launch in launches for name in launch.waits}
        self._streams = tuple(streams.values())
        self._ends = tuple(torch.Event(device) for _ in streams)
        self._begin = torch.Event(device)
        self._steps = tuple(
            _StreamStep(
                run=launch.run,
                dead=launch.dead,
                stream=streams.get(launch.stream),
                waits=tuple(events[name] for name in launch.waits),
                done=events.get(launch.node),
            )
            for launch in launches
        )

    def run(self, step: StepState) -> None:
        """Launch everything in order."""
        callers = torch.accelerator.current_stream(self._device)
        self._begin.record(callers)
        for stream in self._streams:
            stream.wait_event(self._begin)
        for one in self._steps:
            _launch(one, step, callers)
            for register in one.dead:
                step.registers[register] = None
        for stream, end in zip(self._streams, self._ends, strict=True):
            end.record(stream)
            callers.wait_event(end)


def _launch(one: _StreamStep, step: StepState, callers: torch.Stream) -> None:
    stream = one.stream or callers
    for event in one.waits:
        stream.wait_event(event)
    if one.stream is None:
        one.run(step)
    else:
        with one.stream:
            one.run(step)
    if one.done is not None:
        one.done.record(stream)
