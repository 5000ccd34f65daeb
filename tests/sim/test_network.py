"""Shared links against a fluid that flows in small steps."""

from collections import Counter
from functools import partial

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sagellm.core.identity import InstanceId, TransferId
from sagellm.cost_model.link import Link
from sim.environment import CallQueue, FunctionCall
from sim.network import Network

FIXED_NS = 100
Move = tuple[int, str, str, int]  # start, source, target, bytes


class Bench:
    """A network, its timers, and when each transfer ended."""

    def __init__(self, gbps: float = 1.0) -> None:
        self.calls = CallQueue()
        self.ends_ns: dict[int, int] = {}
        self.network = Network(Link("link", FIXED_NS, gbps, "spec", ""), self.calls)

    def start(self, index: int, source: str, target: str, num_bytes: int) -> None:
        done = lambda: self.ends_ns.__setitem__(index, self.calls.now_ns)  # noqa: E731
        self.network.start(
            TransferId(str(index)), InstanceId(source), InstanceId(target), num_bytes, self.calls.now_ns, done
        )

    def run(self, moves: list[Move], cancels: dict[int, int] | None = None) -> dict[int, int]:
        for index, (at_ns, source, target, num_bytes) in enumerate(moves):
            start = partial(self.start, index, source, target, num_bytes)
            self.calls.call_at(at_ns, FunctionCall(lambda _, start=start: start()))
        for index, at_ns in (cancels or {}).items():
            self.calls.call_at(at_ns, FunctionCall(partial(self._cancel, index)))
        while self.calls.run_instant():
            pass
        return self.ends_ns

    def _cancel(self, index: int, at_ns: int) -> None:
        self.network.cancel(TransferId(str(index)), at_ns)


def fluid(moves: list[Move], gbps: float, cancels: dict[int, int] | None = None) -> dict[int, float]:
    """From one change of the set of transfers to the next, with rates made anew each time."""
    left = {index: float(num_bytes) for index, (_, _, _, num_bytes) in enumerate(moves)}
    begins = {index: at_ns + FIXED_NS for index, (at_ns, *_) in enumerate(moves)}
    ends: dict[int, float] = {}
    now = 0.0
    while left:
        for index, at_ns in (cancels or {}).items():
            if index in left and at_ns <= now:
                del left[index]
        active = [index for index in left if begins[index] <= now]
        load = Counter(end for i in active for end in (("out", moves[i][1]), ("in", moves[i][2])))
        rates = {i: gbps / max(load["out", moves[i][1]], load["in", moves[i][2]]) for i in active}
        changes = [begins[i] for i in left if begins[i] > now]
        changes += [at_ns for i, at_ns in (cancels or {}).items() if i in left and at_ns > now]
        changes += [now + left[i] / rates[i] for i in active]
        if not changes:
            break
        then = min(changes)
        for index in active:
            left[index] -= (then - now) * rates[index]
            if left[index] <= 1e-6:
                del left[index]
                ends[index] = then
        now = then
    return ends


MOVES = st.lists(
    st.tuples(
        st.integers(0, 20_000), st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from([1, 500, 1000, 7777])
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(moves=MOVES, gbps=st.sampled_from([0.5, 1.0, 3.0]))
def test_against_a_fluid(moves: list[Move], gbps: float) -> None:
    moves = sorted(moves)
    expected = fluid(moves, gbps)
    found = Bench(gbps).run(moves)
    assert found.keys() == expected.keys()
    for index, end_ns in found.items():
        # Each end, of this transfer or of another that shared its link, is taken to the next nanosecond.
        assert abs(end_ns - expected[index]) <= len(moves) + 1


@settings(max_examples=60, deadline=None)
@given(moves=MOVES, cancelled=st.integers(0, 11), at_ns=st.integers(0, 30_000))
def test_a_cancelled_transfer_leaves_its_share_to_the_others(moves: list[Move], cancelled: int, at_ns: int) -> None:
    moves = sorted(moves)
    cancels = {cancelled: max(at_ns, moves[cancelled][0])} if cancelled < len(moves) else {}
    expected = fluid(moves, 1.0, cancels)
    found = Bench(1.0).run(moves, cancels)
    for index in expected.keys() & found.keys():
        assert abs(found[index] - expected[index]) <= len(moves) + 1
    # Where it was cancelled in the nanosecond of its end, either may be true.
    assert expected.keys() ^ found.keys() <= cancels.keys()


@pytest.mark.parametrize("num_transfers", [1, 2, 3, 8])
def test_equal_transfers_share_evenly(num_transfers: int) -> None:
    """And all bytes are carried: together they take as long as all bytes one after the other."""
    ends_ns = Bench(1.0).run([(0, "a", "x", 6000)] * num_transfers)
    assert len(set(ends_ns.values())) == 1
    assert ends_ns[0] == pytest.approx(FIXED_NS + 6000 * num_transfers, abs=2)


def test_other_links_are_not_disturbed() -> None:
    ends_ns = Bench(1.0).run([(0, "a", "x", 6000), (0, "b", "y", 6000), (0, "b", "z", 6000)])
    assert ends_ns[0] == pytest.approx(FIXED_NS + 6000, abs=2)
    assert ends_ns[1] == ends_ns[2] == pytest.approx(FIXED_NS + 12000, abs=2)


def test_what_is_under_way_is_known() -> None:
    bench = Bench()
    bench.start(0, "a", "x", 1000)
    bench.start(1, "b", "x", 1000)
    of_a = bench.network.transfers_of(InstanceId("a"))
    of_x = bench.network.transfers_of(InstanceId("x"))
    assert of_a == [("0", "a")]
    assert of_x == [("0", "a"), ("1", "b")]
    assert bench.network.cancel(TransferId("0"), 0)
    assert not bench.network.cancel(TransferId("0"), 0)
    assert bench.network.transfers_of(InstanceId("a")) == []
