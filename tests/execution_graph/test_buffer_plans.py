"""Buffers: what is placed in one arena never writes over what is still needed."""

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import model_configs, random_graphs

from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import Edge, ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import Split
from sagellm.runtime.execution_graph.ordering import sorted_nodes
from sagellm.runtime.execution_graph.passes.fusion import fuse
from sagellm.runtime.execution_graph.passes.kv_sends import add_kv_sends
from sagellm.runtime.execution_graph.passes.memory import ALIGNMENT_BYTES, BufferPlan, plan_buffers
from sagellm.runtime.execution_graph.passes.scheduling import schedule
from sagellm.runtime.execution_graph.tensors import StepSizes

SIZES = StepSizes(num_tokens=70, num_seqs=5, num_sampled=3)


class Arena:
    """Remembers who wrote each unit of memory last."""

    def __init__(self, plan: BufferPlan) -> None:
        self._places = {one.name: one for one in plan.placements}
        self._owners = [""] * (plan.peak_bytes // ALIGNMENT_BYTES)

    def write(self, name: str) -> None:
        self._owners[self._units(name)] = [name] * len(self._owners[self._units(name)])

    def holds(self, name: str) -> bool:
        return set(self._owners[self._units(name)]) == {name}

    def _units(self, name: str) -> slice:
        place = self._places[name]
        assert place.offset % ALIGNMENT_BYTES == 0
        return slice(place.offset // ALIGNMENT_BYTES, -(-(place.offset + place.num_bytes) // ALIGNMENT_BYTES))


def lies_in(graph: ExecutionGraph) -> dict[str, str]:
    """For each activation the one in whose memory it lies: parts of a split lie in what was split."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        for output in node.outputs:
            found[output] = found[node.inputs[0]] if isinstance(node.operator, Split) else output
    return found


def walk(graph: ExecutionGraph, plan: BufferPlan) -> None:
    """Runs the graph's order in the arena; outputs are written while inputs are still read."""
    arena, storage = Arena(plan), lies_in(graph)
    workspaces = {place.name for place in plan.placements} - set(storage.values())
    for node in graph.nodes:
        written = [output for output in node.outputs if storage[output] == output]
        written += [f"{node.name}.workspace"] if f"{node.name}.workspace" in workspaces else []
        for name in written:
            arena.write(name)
        read = {storage[name] for name in node.inputs if name in storage}
        assert all(arena.holds(name) for name in (*written, *read)), node.name
    assert all(arena.holds(storage[name]) for name in graph.outputs)


def any_order(graph: ExecutionGraph, rng: Random) -> ExecutionGraph:
    """An order in which streams may really run: each in its own order, against each other as edges allow."""
    edges = list(graph.edges)
    last: dict[str, Node] = {}
    for node in graph.nodes:
        if node.stream in last:
            edges.append(Edge(last[node.stream].name, node.name, "stream", "data"))
        last[node.stream] = node
    nodes = list(graph.nodes)
    rng.shuffle(nodes)
    order = sorted_nodes(nodes, edges)
    assert order is not None
    return msgspec.structs.replace(graph, nodes=order)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), tp=st.sampled_from([1, 2]), fused=st.booleans())
def test_nothing_alive_is_written_over(data: st.DataObject, tp: int, fused: bool) -> None:
    source = st.one_of(random_graphs(tp), model_configs(tp).map(lambda config: build_graph(config, tp)))
    graph = data.draw(source)
    graph = fuse(graph) if fused else graph
    plan = plan_buffers(graph, SIZES)
    walk(graph, plan)
    assert plan.peak_bytes <= plan.unshared_bytes


@settings(max_examples=80, deadline=None)
@given(data=st.data(), tp=st.sampled_from([1, 2]), seed=st.integers(0, 2**32))
def test_plans_hold_for_whatever_streams_do(data: st.DataObject, tp: int, seed: int) -> None:
    graph = data.draw(st.one_of(random_graphs(tp), model_configs(tp).map(lambda config: build_graph(config, tp))))
    rng = Random(seed)
    scheduled = schedule(add_kv_sends(graph), lambda node: rng.choice([0.0, 1.0, 5.0])).graph
    plan = plan_buffers(scheduled, SIZES)
    for _ in range(3):
        walk(any_order(scheduled, rng), plan)


def test_the_plan_of_large_steps_holds_small_ones() -> None:
    graph = fuse(build_graph(load_model_config("sagellm/toy")))
    large, small = (plan_buffers(graph, StepSizes(size, 8, 8)) for size in (512, 100))
    sizes_of_small = {place.name: place.num_bytes for place in small.placements}
    assert all(sizes_of_small[place.name] <= place.num_bytes for place in large.placements)
    assert small.peak_bytes < large.peak_bytes


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B", "Qwen/Qwen3-30B-A3B"])
def test_memory_does_not_grow_with_layers(name: str) -> None:
    """All layers share the buffers of one; without sharing each would have its own."""
    graph = fuse(build_graph(load_model_config(name)))
    plan = plan_buffers(graph, StepSizes(8192, 256, 256))
    assert plan.unshared_bytes > 15 * plan.peak_bytes


def test_the_peak_is_that_of_the_widest_moment() -> None:
    """No plan can be smaller than what is alive at once; for layers of one kind this one is not larger either."""
    graph = fuse(build_graph(load_model_config("meta-llama/Llama-3.1-8B")))
    sizes = StepSizes(1024, 8, 8)
    storage, by_name = lies_in(graph), graph.tensors_by_name
    last_use = {
        storage[name]: index for index, node in enumerate(graph.nodes) for name in node.inputs if name in storage
    }
    alive: set[str] = set()
    widest = 0
    for index, node in enumerate(graph.nodes):
        alive |= {storage[name] for name in node.outputs}
        widest = max(widest, sum(by_name[name].num_bytes(sizes) for name in alive))
        alive = {name for name in alive if last_use.get(name, len(graph.nodes)) > index}
    assert plan_buffers(graph, sizes).peak_bytes == widest
