"""Turning sessions into a trace: turns are released in order of time, and become requests one by one."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from traces.columns import requests_from_columns
from traces.request_trace import Trace
from traces.think_time import think_time_ns

_NANOSECONDS_PER_SECOND = 1_000_000_000


@dataclass(slots=True)
class EmittedTurns:
    """Requests so far, in columns and in order of arrival."""

    arrival_s: list[float] = field(default_factory=list)
    num_prompt_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)
    content_ids: list[tuple[int, ...]] = field(default_factory=list)
    previous: list[int | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn to come. ``turn_index`` counts from 0 in its session."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    content_ids: tuple[int, ...]
    previous: int | None
    turn_index: int = 0


class BlockNumbers:
    """Hands out ids of content that nothing had before."""

    def __init__(self, first: int) -> None:
        self._next = first

    def new(self, count: int) -> tuple[int, ...]:
        """So many new ids."""
        self._next += count
        return tuple(range(self._next - count, self._next))


def emit_turns(
    num_requests: int,
    first_turn: Callable[[EmittedTurns], Turn],
    next_turn: Callable[[Turn, int], Turn | None],
) -> EmittedTurns:
    """Run sessions side by side until there are ``num_requests`` turns.

    ``first_turn`` gives the first turn of the next session, each no earlier than the one before.
    ``next_turn`` is given a turn and its index in the trace, and gives the one that follows it, if any.
    """
    emitted = EmittedTurns()
    waiting: list[tuple[float, int, Turn]] = []
    root = first_turn(emitted)
    for index in range(num_requests):
        turn = heapq.heappop(waiting)[2] if waiting and waiting[0][0] <= root.arrival_s else root
        emitted.arrival_s.append(turn.arrival_s)
        emitted.num_prompt_tokens.append(turn.num_prompt_tokens)
        emitted.num_output_tokens.append(turn.num_output_tokens)
        emitted.content_ids.append(turn.content_ids)
        emitted.previous.append(turn.previous)
        if turn is root:
            root = first_turn(emitted)
        follow_up = next_turn(turn, index)
        if follow_up is not None:
            heapq.heappush(waiting, (follow_up.arrival_s, index, follow_up))
    return emitted


def session_trace(turns: EmittedTurns, content_block_size: int) -> Trace:
    """The trace of these turns, its arrivals counted from the first."""
    arrival_ns = [round((arrival - turns.arrival_s[0]) * _NANOSECONDS_PER_SECOND) for arrival in turns.arrival_s]
    gap_ns = [
        0 if before is None else think_time_ns(arrival_ns[index] - arrival_ns[before], turns.num_output_tokens[before])
        for index, before in enumerate(turns.previous)
    ]
    requests = requests_from_columns(
        arrival_ns,
        turns.num_prompt_tokens,
        turns.num_output_tokens,
        content_ids=turns.content_ids,
        previous=turns.previous,
        gap_ns=gap_ns,
    )
    return Trace(name="", requests=requests, content_block_size=content_block_size)
