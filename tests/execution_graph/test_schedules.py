"""Schedules keep every edge, never run two nodes of one stream at once, and hide what can be hidden."""

from collections import defaultdict
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import model_configs, random_graphs

from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.assembly import GraphAssembly
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import Embedding, KVSend, Linear, RmsNorm, Silu
from sagellm.runtime.execution_graph.passes.fusion import fuse
from sagellm.runtime.execution_graph.passes.kv_sends import add_kv_sends
from sagellm.runtime.execution_graph.passes.scheduling import Schedule, cross_stream_waits, schedule
from sagellm.runtime.execution_graph.validation import validate


def any_graphs(tp: int) -> st.SearchStrategy[ExecutionGraph]:
    models = model_configs(tp).map(lambda config: build_graph(config, tp))
    return st.one_of(random_graphs(tp), models).map(add_kv_sends)


def drawn_durations(graph: ExecutionGraph, rng: Random) -> dict[str, float]:
    return {node.name: rng.choice([0.0, 1.0, 2.5, 10.0]) for node in graph.nodes}


def scheduled(graph: ExecutionGraph, durations: dict[str, float]) -> Schedule:
    return schedule(graph, lambda node: durations[node.name])


@settings(max_examples=80, deadline=None)
@given(graph=st.sampled_from([1, 2]).flatmap(any_graphs), seed=st.integers(0, 2**32))
def test_edges_and_streams_are_kept(graph: ExecutionGraph, seed: int) -> None:
    durations = drawn_durations(graph, Random(seed))
    plan = scheduled(graph, durations)
    validate(plan.graph)
    start = {node.name: ns for node, ns in zip(plan.graph.nodes, plan.start_ns, strict=True)}
    end = {node.name: ns for node, ns in zip(plan.graph.nodes, plan.end_ns, strict=True)}
    assert start.keys() == {node.name for node in graph.nodes}
    for edge in graph.edges:
        assert end[edge.before] <= start[edge.after]
    of_stream: dict[str, list[Node]] = defaultdict(list)
    for node in plan.graph.nodes:
        of_stream[node.stream].append(node)
    for nodes in of_stream.values():
        assert all(end[one.name] <= start[two.name] for one, two in pairwise(nodes))
    assert collectives(plan.graph) == collectives(graph)
    assert list(plan.start_ns) == sorted(plan.start_ns)


def collectives(graph: ExecutionGraph) -> list[str]:
    return [node.name for node in graph.nodes if node.operator.is_collective]


def two_ranks(num_branches: int) -> ExecutionGraph:
    """Branches that have nothing to do with each other, each a linear, its sum over ranks, and a norm."""
    config = load_model_config("sagellm/toy")
    graph = GraphAssembly(config, 2)
    x = graph.add("x", Embedding(), "token_ids", graph.whole("table", 512, 64))
    ends = []
    for branch in range(num_branches):
        y = graph.add(f"linear{branch}", Linear(), x, graph.whole(f"weight{branch}", 64, 64))
        y = graph.all_reduce(y)
        ends.append(graph.add(f"norm{branch}", RmsNorm(1e-6), y, graph.whole(f"norm_weight{branch}", 64)))
    return graph.finish(*ends)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_collectives_never_change_places(data: st.DataObject, seed: int) -> None:
    """Whatever is ready first: another rank may see other times, and must meet the same sums."""
    graph = two_ranks(data.draw(st.integers(2, 6)))
    plan = scheduled(graph, drawn_durations(graph, Random(seed)))
    assert collectives(plan.graph) == collectives(graph)


def test_sums_run_beside_what_does_not_need_them() -> None:
    """Four branches of equal steps: after the first linear, sums and linears overlap."""
    graph = two_ranks(4)
    plan = schedule(graph, lambda node: 1.0)
    assert sum(1.0 for _ in graph.nodes) == 13.0
    # Embedding, four linears, four norms; the last sum has nothing but its norm left to hide behind.
    assert plan.duration_ns <= 1 + 4 + 1 + 4


def test_the_longest_chain_goes_first() -> None:
    """A linear with a long sum behind it starts before elder operators with nothing behind them."""
    graph = GraphAssembly(load_model_config("sagellm/toy"), 2)
    x = graph.add("x", Embedding(), "token_ids", graph.whole("table", 512, 64))
    idle = [graph.add(f"silu{number}", Silu(), x) for number in range(3)]
    y = graph.all_reduce(graph.add("linear", Linear(), x, graph.whole("weight", 64, 64)))
    plan = schedule(graph.finish(*idle, y), lambda node: 3.0 if node.operator.is_collective else 1.0)
    assert [node.name for node in plan.graph.nodes][:2] == ["x", "linear"]
    assert plan.duration_ns == 1 + 1 + 3


@settings(max_examples=60, deadline=None)
@given(graph=st.sampled_from([1, 2]).flatmap(any_graphs), seed=st.integers(0, 2**32))
def test_no_longer_than_one_by_one_and_no_shorter_than_the_longest_chain(graph: ExecutionGraph, seed: int) -> None:
    durations = drawn_durations(graph, Random(seed))
    plan = scheduled(graph, durations)
    chain: dict[str, float] = {}
    for node in graph.nodes:
        before = [chain[edge.before] for edge in graph.edges if edge.after == node.name]
        chain[node.name] = max(before, default=0.0) + durations[node.name]
    assert max(chain.values()) - 1e-9 <= plan.duration_ns <= sum(durations.values()) + 1e-9


@settings(max_examples=60, deadline=None)
@given(graph=st.sampled_from([1, 2]).flatmap(any_graphs), seed=st.integers(0, 2**32))
def test_waits_between_streams_imply_every_edge(graph: ExecutionGraph, seed: int) -> None:
    """A driver that only runs each stream in order and waits where told keeps all edges, and needs every wait."""
    ordered = scheduled(graph, drawn_durations(graph, Random(seed))).graph
    waits = cross_stream_waits(ordered)
    implied = over_before(ordered, waits)
    assert all(edge.before in implied[edge.after] for edge in ordered.edges)
    for name, sources in waits.items():
        for source in sources:
            fewer = {**waits, name: tuple(other for other in sources if other != source)}
            assert source not in over_before(ordered, fewer)[name]


def over_before(graph: ExecutionGraph, waits: dict[str, tuple[str, ...]]) -> dict[str, set[str]]:
    """For each node those that are over before it starts, by the order within streams and the waits."""
    last: dict[str, str] = {}
    implied: dict[str, set[str]] = {}
    for node in graph.nodes:
        direct = [*waits.get(node.name, ()), *([last[node.stream]] if node.stream in last else [])]
        implied[node.name] = {name for one in direct for name in (one, *implied[one])}
        last[node.stream] = node.name
    return implied


@pytest.mark.parametrize("tp", [1, 2])
def test_kv_sends_hide_behind_later_layers(tp: int) -> None:
    """With sends as long as a layer's compute, only the last layer's send is seen."""
    graph = add_kv_sends(fuse(build_graph(load_model_config("sagellm/qwen3-100m"), tp)))
    send_ns = 5.0
    plan = schedule(graph, lambda node: send_ns if isinstance(node.operator, KVSend) else 1.0)
    without = schedule(graph, lambda node: 0.0 if isinstance(node.operator, KVSend) else 1.0)
    sends = [node for node in plan.graph.nodes if isinstance(node.operator, KVSend)]
    assert len(sends) == 12
    assert without.duration_ns <= plan.duration_ns < without.duration_ns + send_ns
    assert all(node.stream == "kv_send" for node in sends)
