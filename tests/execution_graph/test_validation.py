"""Graphs that cannot be run are refused in one sentence that names what is wrong."""

from collections.abc import Callable

import msgspec
import pytest

from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph import operators as ops
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node, from_json
from sagellm.runtime.execution_graph.tensors import NUM_SAMPLED, Extent, Shard, StepSizes, Tensor, WeightSource
from sagellm.runtime.execution_graph.validation import validate

GRAPH = build_graph(load_model_config("sagellm/toy"), 2)
replaced = msgspec.structs.replace


def with_node(name: str, change: Callable[[Node], tuple[Node, ...]]) -> ExecutionGraph:
    nodes = [new for node in GRAPH.nodes for new in (change(node) if node.name == name else (node,))]
    assert len(nodes) != len(GRAPH.nodes) or tuple(nodes) != GRAPH.nodes
    return replaced(GRAPH, nodes=tuple(nodes))


def with_tensor(name: str, **changes: object) -> ExecutionGraph:
    return replaced(GRAPH, tensors=tuple(replaced(t, **changes) if t.name == name else t for t in GRAPH.tensors))


def swapped(one: str, other: str) -> ExecutionGraph:
    by_name = {node.name: node for node in GRAPH.nodes}
    other_of = {one: by_name[other], other: by_name[one]}
    return replaced(GRAPH, nodes=tuple(other_of.get(node.name, node) for node in GRAPH.nodes))


def test_what_the_builder_makes_is_valid() -> None:
    validate(GRAPH)


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (swapped("layers.0.q_proj", "layers.0.q_norm"), "node layers.0.q_norm: its input layers.0.q_proj does not"),
        (swapped("layers.0.kv_write", "layers.0.attention"), "layers.0.kv_write writes only later"),
        (with_node("layers.1.kv_write", lambda node: ()), "nothing writes the KV of layer 1"),
        (
            with_node("layers.1.kv_write", lambda node: (node, replaced(node, name="again"))),
            "node again: layers.1.kv_write writes the KV of layer 1 already",
        ),
        (with_node("layers.1.attention", lambda node: (replaced(node, layer=9),)), "the KV of layer 9, of 2 layers"),
        (with_node("layers.0.silu", lambda node: (node, node)), "node layers.0.silu: there are two of that name"),
        (
            with_node("layers.0.silu", lambda node: (node, replaced(node, name="more"))),
            "node more: its output layers.0.silu is there already",
        ),
        (with_node("logits", lambda node: ()), "its output logits is never produced"),
        (with_node("layers.0.gated", lambda node: (replaced(node, inputs=node.inputs[:1]),)), "1 inputs, must have 2"),
        (with_node("layers.0.silu", lambda node: (replaced(node, outputs=("odd",)),)), "its output odd is no tensor"),
        (
            with_node("logits", lambda node: (replaced(node, operator=ops.AllGather(100)),)),
            "node logits: its outputs are float32[num_sampled, 260], must be float32[num_sampled, 100]",
        ),
        (
            with_node("layers.0.q_rotary", lambda node: (replaced(node, inputs=(node.inputs[0], "sampled_rows")),)),
            "node layers.0.q_rotary: positions has shape [num_sampled], must be [num_tokens]",
        ),
        (with_tensor("layers.0.silu", shape=(3, 96)), "node layers.0.silu: its outputs are"),
        (with_tensor("layers.0.silu", dtype="float8"), "tensor layers.0.silu: dtype is float8, must be one of"),
        (with_tensor("layers.0.silu", shape=(0, 96)), "sizes must be 1 or more"),
        (with_tensor("positions", kind="activation"), "inputs are ['positions', 'sampled_rows', 'token_ids']"),
        (replaced(GRAPH, tensors=(*GRAPH.tensors, GRAPH.tensors[0])), "two tensors have one name"),
        (replaced(GRAPH, weights=GRAPH.weights[1:]), "not every weight says once what it is made from"),
        (
            replaced(GRAPH, weights=(replaced(GRAPH.weights[0], sources=()), *GRAPH.weights[1:])),
            "weight model.embed_tokens.weight: it has no sources",
        ),
        (
            replaced(
                GRAPH, weights=(replaced(GRAPH.weights[0], sources=(WeightSource("x", (9, 64)),)), *GRAPH.weights[1:])
            ),
            "weight model.embed_tokens.weight: parts [(9, 64)] cannot be joined to [130, 64]",
        ),
    ],
)
def test_broken_graphs_are_named(graph: ExecutionGraph, words: str) -> None:
    with pytest.raises(ValueError, match=r"^(node|tensor|weight|graph of)") as caught:
        validate(graph)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"model": "x", "num_layers": "two"}'])
def test_json_that_is_no_graph_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an execution graph"):
        from_json(data)


def test_ranks_that_cannot_share_the_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="tp is 3, must divide its 4 query heads"):
        build_graph(load_model_config("sagellm/toy"), 3)


def test_parts_cover_a_weight_once_and_copies_are_neighbours() -> None:
    uneven = WeightSource("x", (10, 3), Shard(0, 4))
    assert [uneven.range_of(rank, 4) for rank in range(4)] == [(0, 0, 3), (0, 3, 6), (0, 6, 9), (0, 9, 10)]
    assert uneven.rank_shape == (3, 3)
    copied = WeightSource("x", (8, 3), Shard(0, 2))
    assert [copied.range_of(rank, 4) for rank in range(4)] == [(0, 0, 4), (0, 0, 4), (0, 4, 8), (0, 4, 8)]
    columns = WeightSource("x", (8, 4), Shard(1, 2))
    assert columns.range_of(1, 2) == (1, 2, 4)
    assert WeightSource("x", (8, 4)).range_of(1, 2) == (0, 0, 8)


def test_a_width_that_depends_on_the_step_is_no_width() -> None:
    with pytest.raises(ValueError, match="tensor ids: its last dimension is"):
        _ = Tensor("ids", GRAPH.tensors_by_name["token_ids"].shape, "int64", "input").width


def test_extents_read_as_they_are_written() -> None:
    texts = [str(extent) for extent in (Extent(num_tokens=1), Extent(num_seqs=3, constant=1), Extent(), NUM_SAMPLED)]
    assert texts == ["num_tokens", "3 num_seqs + 1", "0", "num_sampled"]
    assert NUM_SAMPLED.times(2).value(StepSizes(num_sampled=5)) == 10
