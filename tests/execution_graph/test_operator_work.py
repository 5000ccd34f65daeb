"""FLOPs and bytes of operators, and what passes do to them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import model_configs

from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.expert_operators import Experts, experts_touched
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.operators import Attention, KVSend, Linear, OperatorWork
from sagellm.runtime.execution_graph.passes.fusion import fuse, fuse_head_norms
from sagellm.runtime.execution_graph.passes.kv_sends import add_kv_sends
from sagellm.runtime.execution_graph.tensors import StepSizes

SIZES = StepSizes(num_tokens=37, num_seqs=5, num_sampled=4, num_context_tokens=900, num_token_pairs=4000)


def total(graph: ExecutionGraph, *kinds: type, sizes: StepSizes = SIZES) -> OperatorWork:
    works = [graph.work(node, sizes) for node in graph.nodes if not kinds or isinstance(node.operator, kinds)]
    return OperatorWork(*(sum(values) for values in zip(*works, strict=True)))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), tp=st.sampled_from([1, 2]))
def test_fusion_saves_passes_over_activations_and_nothing_else(data: st.DataObject, tp: int) -> None:
    graph = build_graph(data.draw(model_configs(tp)), tp)
    before, after = total(graph), total(fuse_head_norms(fuse(graph)))
    assert total(graph, Linear, Experts, Attention).flops == total(fuse(graph), Linear, Experts, Attention).flops
    assert after.weight_bytes == before.weight_bytes
    assert after.kv_read_bytes == before.kv_read_bytes
    assert after.kv_written_bytes == before.kv_written_bytes
    assert after.communicated_bytes == before.communicated_bytes
    assert after.memory_bytes < before.memory_bytes or fuse(graph) == graph


@settings(max_examples=50, deadline=None)
@given(data=st.data(), tp=st.sampled_from([1, 2]), factor=st.integers(2, 5))
def test_work_grows_with_the_step(data: st.DataObject, tp: int, factor: int) -> None:
    graph = build_graph(data.draw(model_configs(tp)), tp)
    more = StepSizes(*(factor * size for size in SIZES))
    for node in graph.nodes:
        small, large = graph.work(node, SIZES), graph.work(node, more)
        assert all(0 <= one <= other <= factor * one for one, other in zip(small, large, strict=True)), node.name


def test_a_linear_by_hand() -> None:
    graph = build_graph(load_model_config("Qwen/Qwen2.5-7B"))
    node = next(node for node in graph.nodes if node.name == "layers.3.k_proj")
    work = graph.work(node, SIZES)
    assert work.flops == 2 * 37 * 3584 * 512
    assert work.weight_bytes == 2 * (3584 * 512 + 512)
    assert (work.read_bytes, work.written_bytes) == (2 * 37 * 3584, 2 * 37 * 512)


def test_attention_by_hand() -> None:
    graph = build_graph(load_model_config("Qwen/Qwen2.5-7B"), 2)
    node = next(node for node in graph.nodes if node.name == "layers.0.attention")
    work = graph.work(node, SIZES)
    assert work.flops == 4 * 14 * 128 * 4000
    assert work.kv_read_bytes == 2 * 2 * 128 * 2 * 900


def test_every_token_writes_and_sends_its_kv_once() -> None:
    config = load_model_config("Qwen/Qwen3-8B")
    graph = add_kv_sends(fuse(build_graph(config)))
    assert total(graph).kv_written_bytes == 37 * config.shape.kv_bytes_per_token
    assert total(graph, KVSend).communicated_bytes == 37 * config.shape.kv_bytes_per_token


@pytest.mark.parametrize(("experts", "chosen"), [(128, 8), (4, 4), (6, 1)])
def test_experts_touched_lie_between_one_tokens_and_all(experts: int, chosen: int) -> None:
    assert experts_touched(experts, chosen, 1) == pytest.approx(chosen)
    assert experts_touched(experts, chosen, 10_000) == pytest.approx(experts)
    assert experts_touched(experts, chosen, 0) == 0
