"""Every pass gives a valid graph that computes what the graph before it computes."""

from collections.abc import Callable
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_interpreter import Batch, run
from random_graphs import assert_same, batches, checkpoint, model_configs, random_graphs

from sagellm.models.known_models import load_model_config
from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph import fused_operators as fused
from sagellm.runtime.execution_graph import operators as ops
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph, from_json, to_json
from sagellm.runtime.execution_graph.ordering import sorted_nodes
from sagellm.runtime.execution_graph.passes.fusion import (
    fuse,
    fuse_add_norm,
    fuse_head_norms,
    fuse_rotary_kv_write,
    fuse_silu_multiply,
)
from sagellm.runtime.execution_graph.passes.joined_projections import join_projections
from sagellm.runtime.execution_graph.passes.kv_sends import add_kv_sends
from sagellm.runtime.execution_graph.passes.scheduling import schedule
from sagellm.runtime.execution_graph.validation import validate

Pass = Callable[[ExecutionGraph], ExecutionGraph]


def all_fusions(graph: ExecutionGraph) -> ExecutionGraph:
    return fuse_head_norms(fuse(graph))


def random_schedule(graph: ExecutionGraph) -> ExecutionGraph:
    rng = Random(len(graph.nodes))
    return schedule(add_kv_sends(graph), lambda node: rng.choice([0.0, 1.0, 7.0])).graph


def random_order(graph: ExecutionGraph) -> ExecutionGraph:
    """Any order that keeps the edges: what ``edges`` leave out, a schedule may change."""
    nodes = list(graph.nodes)
    Random(len(nodes)).shuffle(nodes)
    order = sorted_nodes(nodes, graph.edges)
    assert order is not None
    return msgspec.structs.replace(graph, nodes=order)


PASSES: tuple[Pass, ...] = (
    join_projections,
    lambda graph: fuse_silu_multiply(join_projections(graph)),
    fuse_add_norm,
    fuse_rotary_kv_write,
    lambda graph: fuse_head_norms(fuse_rotary_kv_write(graph)),
    all_fusions,
    random_schedule,
    lambda graph: random_schedule(all_fusions(graph)),
    random_order,
)


@settings(max_examples=60, deadline=None)
@given(graph=st.sampled_from([1, 2]).flatmap(random_graphs), batch=batches(), rewrite=st.sampled_from(PASSES))
def test_random_graphs(graph: ExecutionGraph, batch: Batch, rewrite: Pass) -> None:
    validate(graph)
    rewritten = rewrite(graph)
    validate(rewritten)
    assert_same(run(graph, batch, checkpoint), run(rewritten, batch, checkpoint))
    assert rewrite(graph) == rewritten


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tp=st.sampled_from([1, 2, 4]), batch=batches(), rewrite=st.sampled_from(PASSES))
def test_random_models(data: st.DataObject, tp: int, batch: Batch, rewrite: Pass) -> None:
    graph = build_graph(data.draw(model_configs(tp)), tp)
    validate(graph)
    rewritten = rewrite(graph)
    validate(rewritten)
    assert_same(run(graph, batch, checkpoint), run(rewritten, batch, checkpoint))


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), tp=st.sampled_from([2, 4]), batch=batches(), rewrite=st.sampled_from((all_fusions, random_order))
)
def test_all_ranks_together_compute_what_one_does(data: st.DataObject, tp: int, batch: Batch, rewrite: Pass) -> None:
    config = data.draw(model_configs(tp))
    alone = without_past(batch)
    one = run(build_graph(config, 1), alone, checkpoint)
    several = run(rewrite(build_graph(config, tp)), alone, checkpoint)
    for outputs in several.outputs:
        difference = abs(outputs["logits"] - one.outputs[0]["logits"]).max()
        assert difference < 1e-8


def without_past(batch: Batch) -> Batch:
    """The same rows as whole prompts: what is cached would have to be shared out among ranks."""
    return Batch(batch.num_rows, batch.num_rows, batch.token_ids, batch.sampled_rows)


@settings(max_examples=30, deadline=None)
@given(graph=st.sampled_from([1, 2]).flatmap(random_graphs))
def test_json_gives_the_same_graph(graph: ExecutionGraph) -> None:
    scheduled = random_schedule(all_fusions(graph))
    assert from_json(to_json(scheduled)) == scheduled


def counted(graph: ExecutionGraph, *kinds: type[ops.Operator]) -> list[int]:
    return [sum(isinstance(node.operator, kind) for node in graph.nodes) for kind in kinds]


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-30B-A3B"])
@pytest.mark.parametrize("tp", [1, 4])
def test_every_layer_is_fused(name: str, tp: int) -> None:
    """The patterns are found in every layer of real models, whatever the ranks: nothing that can be joined is left."""
    config = load_model_config(name)
    layers, experts = config.shape.num_layers, config.shape.num_experts > 0
    graph = all_fusions(build_graph(config, tp))
    validate(graph)
    assert counted(graph, ops.Add, ops.Silu, ops.Multiply, ops.Rotary, ops.KVWrite, ops.HeadRmsNorm) == [0] * 6
    assert counted(graph, ops.RmsNorm, fused.AddRmsNorm) == [1, 2 * layers]
    assert counted(graph, fused.SiluMultiply) == [0 if experts else layers]
    # Joined query, key and value; output; then gate and up, and down, or the router. And the logits.
    assert counted(graph, ops.Linear) == [(3 if experts else 4) * layers + 1]
    written = counted(graph, fused.RotaryKVWrite, fused.HeadNormRotaryKVWrite)
    assert written == ([0, layers] if config.shape.qk_norm else [layers, 0])
    assert counted(graph, ops.AllReduce) == [0 if tp == 1 else 2 * layers + 1]


def test_fusion_leaves_what_somebody_else_reads() -> None:
    """Outputs in the middle of a pattern survive, with their values."""
    config: ModelConfig = load_model_config("sagellm/toy")
    for name in (
        "layers.0.gate_proj",
        "layers.0.silu",
        "layers.0.k_rotary",
        "layers.0.q_norm",
        "layers.1.mlp_residual",
    ):
        graph = msgspec.structs.replace(build_graph(config), outputs=("logits", name))
        rewritten = all_fusions(graph)
        validate(rewritten)
        batch = Batch([3], [3], checkpoint("ids", (3,)).argsort(), checkpoint("rows", (1,)).argsort())
        assert_same(run(graph, batch, checkpoint), run(rewritten, batch, checkpoint))
