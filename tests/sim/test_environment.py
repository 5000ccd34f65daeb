"""Calls happen in order of their time, then of their scheduling, after the simpy events of that time."""

from collections.abc import Generator
from heapq import heapify, heappop, heappush
from typing import Any

import simpy
from hypothesis import given
from hypothesis import strategies as st

from sim.environment import CallQueue, FunctionCall

Plans = list[tuple[int, list[int]]]
"""Of each call: when it is to happen, and how long after it those are that it schedules itself."""


def happened(calls: CallQueue, plans: Plans) -> list[tuple[int, tuple[int, ...]]]:
    """Run the plans; what happened, in order, as (time, name)."""
    order: list[tuple[int, tuple[int, ...]]] = []

    def schedule(name: tuple[int, ...], at_ns: int, delays_ns: list[int]) -> None:
        def happen(now_ns: int) -> None:
            assert now_ns == at_ns == calls.now_ns
            order.append((now_ns, name))
            for index, delay_ns in enumerate(delays_ns):
                schedule((*name, index), now_ns + delay_ns, [])

        calls.call_at(at_ns, FunctionCall(happen))

    for index, (at_ns, delays_ns) in enumerate(plans):
        schedule((index,), at_ns, delays_ns)
    instants = []
    while calls.run_instant():
        instants.append(calls.now_ns)
    assert instants == sorted(set(instants)), "an instant was run twice, or time ran backwards"
    return order


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 3), max_size=3)), max_size=12))
def test_order_of_calls(plans: Plans) -> None:
    """As a heap of (time, number of the scheduling) has it."""
    expected: list[tuple[int, tuple[int, ...]]] = []
    heap = [(at_ns, number, (number,), delays_ns) for number, (at_ns, delays_ns) in enumerate(plans)]
    heapify(heap)
    num_scheduled = len(heap)
    while heap:
        now_ns, _, name, delays_ns = heappop(heap)
        expected.append((now_ns, name))
        for index, delay_ns in enumerate(delays_ns):
            heappush(heap, (now_ns + delay_ns, num_scheduled, (*name, index), []))
            num_scheduled += 1
    assert happened(CallQueue(), plans) == expected


@given(st.lists(st.integers(0, 4), max_size=6), st.lists(st.integers(1, 4), max_size=6))
def test_simpy_events_come_first(calls_at_ns: list[int], delays_ns: list[int]) -> None:
    calls = CallQueue()
    order: list[tuple[int, str]] = []

    def process() -> Generator[simpy.Event, Any, None]:
        for delay_ns in delays_ns:
            yield calls.environment.timeout(delay_ns)
            order.append((int(calls.environment.now), "event"))

    for at_ns in calls_at_ns:
        calls.call_at(at_ns, FunctionCall(lambda now_ns: order.append((now_ns, "call"))))
    calls.environment.process(process())
    while calls.run_instant():
        assert calls.environment.now == calls.now_ns
    ends_ns = [sum(delays_ns[: index + 1]) for index in range(len(delays_ns))]
    expected = [(at_ns, 0, "event") for at_ns in ends_ns] + [(at_ns, 1, "call") for at_ns in calls_at_ns]
    assert order == [(at_ns, name) for at_ns, _, name in sorted(expected)]
