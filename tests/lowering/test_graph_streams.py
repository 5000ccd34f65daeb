"""Nodes on streams of their own: waits keep every edge, memory outlives its users, and sent KV is the cache's."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batches import Sequence
from tiny_models import TinyModel, make_tiny_model

from backends.lowering.kv_sends import KVSends, allocate_staging
from backends.lowering.lifetimes import Lifetimes
from backends.lowering.program import GraphProgram
from backends.registry import get_backend
from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.assembly import GraphAssembly
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.operators import Add, Embedding, Silu
from sagellm.runtime.execution_graph.passes.fusion import fuse
from sagellm.runtime.execution_graph.passes.kv_sends import add_kv_sends
from sagellm.runtime.execution_graph.passes.memory import storage_names
from sagellm.runtime.execution_graph.passes.scheduling import cross_stream_waits, schedule

SENDING = {"qwen3": 3, "mistral": 1, "opt": 2}  # tokens of a chunk that are not handed over


@pytest.fixture(scope="module", params=SENDING)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def scheduled(graph: ExecutionGraph, seed: int) -> ExecutionGraph:
    rng = random.Random(seed)
    return schedule(add_kv_sends(graph), lambda node: rng.choice([0.0, 1.0, 9.0])).graph


def over_before(graph: ExecutionGraph) -> list[set[str]]:
    """For each node all that is over when it begins, by nothing but its stream's order and the waits."""
    waits = cross_stream_waits(graph)
    last: dict[str, str] = {}
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        behind = [*waits.get(node.name, ()), *([last[node.stream]] if node.stream in last else [])]
        found[node.name] = set(behind).union(*(found[name] for name in behind))
        last[node.stream] = node.name
    return list(found.values())


def chains(num_chains: int, length: int, seed: int) -> ExecutionGraph:
    """Sums over ranks that do not need each other, so that a stream goes on while another still reads."""
    graph = GraphAssembly(load_model_config("sagellm/toy"), tp=2)
    table = graph.sharded("table", (512, 64), dim=0)
    ends = [graph.add(f"begin.{chain}", Embedding(sharded=True), "token_ids", table) for chain in range(num_chains)]
    for position in range(length):
        ends = [graph.add(f"{position}.{chain}", Silu(), graph.all_reduce(end)) for chain, end in enumerate(ends)]
    total = ends[0]
    for chain, end in enumerate(ends[1:]):
        total = graph.add(f"total.{chain}", Add(), total, end)
    return scheduled(graph.finish(total), seed)


models = st.builds(
    lambda name, tp, fused, seed: scheduled(
        (fuse if fused else lambda graph: graph)(build_graph(load_model_config(name), tp)), seed
    ),
    st.sampled_from(["sagellm/qwen3-100m", "sagellm/toy"]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 1000),
)

graphs = models | st.builds(chains, st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))


@settings(max_examples=30, deadline=None)
@given(graphs)
def test_waits_keep_every_edge_and_memory_outlives_its_users(graph: ExecutionGraph) -> None:
    """Whatever a stream is given once it has memory back begins after all that used the memory."""
    over = over_before(graph)
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    assert all(edge.before in over[position[edge.after]] for edge in graph.edges)
    storage = storage_names(graph)
    released = {name: at for at, names in Lifetimes(graph).released_after.items() for name in names}
    for name, at in released.items():
        if name in graph.inputs:
            continue
        users = {node.name for node in graph.nodes if name in node.inputs or name in node.outputs}
        owners = {graph.producers[storage[name]].stream}
        if graph.producers[name].operator.is_collective:  # it may have worked in the place of its input
            owners.add(graph.producers[graph.producers[name].inputs[0]].stream)
        for index in range(position[at] + 1, len(graph.nodes)):
            if graph.nodes[index].stream in owners:
                assert users <= over[index]


def test_on_one_stream_memory_goes_back_after_its_last_reader() -> None:
    graph = fuse(build_graph(load_model_config("sagellm/qwen3-100m")))
    last = {name: node.name for node in graph.nodes for name in (*node.outputs, *node.inputs)}
    released = Lifetimes(graph).released_after
    assert {name: at for at, names in released.items() for name in names} == {
        name: at for name, at in last.items() if name not in (*graph.outputs, *graph.weights_by_name)
    }


def test_sent_kv_is_what_the_cache_holds(model: TinyModel) -> None:
    """Chunk by chunk, with part of each chunk for nobody; the staging is larger than what is sent."""
    num_kept = SENDING[str(model.reference.config.model_type)]
    plain, sending = model.program(), model.program(scheduled(fuse(model.graph()), seed=1))
    cache, other = model.cache(), model.cache(seed=5)
    staging = allocate_staging(get_backend("cpu"), cache.kv, 20)
    sequence, twin = Sequence(list(range(3, 33))), Sequence(list(range(3, 33)))
    for num_tokens in (11, 19):
        inputs = cache.batch([(sequence, num_tokens)])
        slots = inputs.slot_mapping[num_kept:]
        staging.fill_(7.0)
        logits = sending.run(inputs, cache.kv, KVSends(slots, staging))
        assert torch.allclose(logits, plain.run(other.batch([(twin, num_tokens)]), other.kv), atol=1e-4)
        for layer, caches in enumerate(zip(cache.kv.keys, cache.kv.values, strict=True)):
            for kind, tensor in enumerate(caches):
                assert torch.equal(staging[layer, kind, : len(slots)], tensor.flatten(0, 1)[slots])
        assert (staging[:, :, len(slots) :] == 7.0).all()
        sequence.num_computed_tokens += num_tokens
        twin.num_computed_tokens += num_tokens


def test_bytes_sent_are_those_of_the_graph(model: TinyModel) -> None:
    graph = add_kv_sends(model.graph())
    cache = model.cache()
    staging = allocate_staging(get_backend("cpu"), cache.kv, 16)
    sends = KVSends(torch.arange(9), staging)
    sent = sum(getattr(node.operator, "token_bytes", 0) for node in graph.nodes)
    assert sends.num_bytes == 9 * sent


def test_a_step_that_sends_nothing_runs_as_ever(model: TinyModel) -> None:
    program: GraphProgram = model.program(add_kv_sends(model.graph()))
    cache = model.cache()
    token_ids = list(range(3, 23))
    logits = program.run(cache.batch([(Sequence(token_ids), 20)]), cache.kv)
    assert (logits - model.logits(token_ids)).abs().max() < 1e-4
