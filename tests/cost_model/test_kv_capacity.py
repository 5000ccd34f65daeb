"""What fits beside the weights."""

from dataclasses import replace

import pytest

from backends.profile_files import load_profile
from sagellm.cost_model.footprint import activation_bytes, rank_weight_bytes
from sagellm.cost_model.graph_prices import engine_graph
from sagellm.cost_model.kv_capacity import kv_capacity_blocks, kv_capacity_tokens
from sagellm.models.known_models import known_model_ids, load_model
from sagellm.runtime.execution_graph.passes.memory import plan_buffers
from sagellm.runtime.execution_graph.tensors import StepSizes

VLLM_KV_TOKENS = 2_056_176  # vLLM 0.22.1, Qwen2.5-7B on one H200 at utilisation 0.9


def test_vllms_own_figure_for_the_7b_on_an_h200() -> None:
    model = load_model("Qwen/Qwen2.5-7B-Instruct")
    assert kv_capacity_tokens(load_profile("h200/vllm-0.22.1-qwen2.5-7b"), model, 1) == VLLM_KV_TOKENS
    assert kv_capacity_tokens(load_profile("h200/vllm-0.22.1"), model, 1) == pytest.approx(VLLM_KV_TOKENS, rel=1e-4)


def test_more_memory_or_more_devices_hold_more() -> None:
    profile, model = load_profile("h200/spec"), load_model("Qwen/Qwen2.5-14B")
    assert kv_capacity_tokens(profile, model, 1, 0.8) < kv_capacity_tokens(profile, model, 1, 0.9)
    # Two ranks hold more than twice as much, since the weights are shared out.
    assert kv_capacity_tokens(profile, model, 2) > 2 * kv_capacity_tokens(profile, model, 1)


def test_blocks_are_whole() -> None:
    profile, model = load_profile("a100/spec"), load_model("Qwen/Qwen3-8B")
    tokens = kv_capacity_tokens(profile, model, 1)
    for block_size in (1, 16, 128):
        blocks = kv_capacity_blocks(profile, model, 1, block_size)
        assert blocks * block_size <= tokens < (blocks + 1) * block_size


def test_a_model_that_does_not_fit_is_named_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"Qwen/Qwen2\.5-72B needs 138") as caught:
        kv_capacity_tokens(load_profile("l40s/spec"), load_model("Qwen/Qwen2.5-72B"), 1)
    assert "40.5 GiB are there" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_utilisation_must_be_a_share() -> None:
    with pytest.raises(ValueError, match=r"memory_utilisation: 1\.5"):
        kv_capacity_tokens(load_profile("h200/spec"), load_model("Qwen/Qwen3-8B"), 1, 1.5)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B", "Qwen/Qwen3-30B-A3B", "facebook/opt-13b", "sagellm/toy"])
@pytest.mark.parametrize("tp", [1, 4])
def test_a_few_layers_tell_the_footprint_of_all(name: str, tp: int) -> None:
    model, sizes = load_model(name), StepSizes(1000, 100, 100)
    if name == "Qwen/Qwen3-30B-A3B":
        model = replace(model, num_layers=9, dense_layers=(1, 4, 5), intermediate_size=4096)
    graph = engine_graph(model, tp)
    assert activation_bytes(model, tp, sizes) == plan_buffers(graph, sizes).peak_bytes
    weight_bytes = sum(tensor.num_bytes(sizes) for tensor in graph.tensors if tensor.kind == "weight")
    assert rank_weight_bytes(model, tp) == weight_bytes


@pytest.mark.parametrize("name", known_model_ids())
def test_one_rank_holds_the_models_parameters(name: str) -> None:
    model = load_model(name)
    assert rank_weight_bytes(model, 1) == model.weight_bytes


def test_ranks_with_copied_heads_hold_more_than_their_share() -> None:
    model = load_model("Qwen/Qwen2.5-72B")
    copies = 2 * model.kv_width * (model.hidden_size + 1) * model.num_layers * model.dtype_bytes
    assert 16 * rank_weight_bytes(model, 16) > model.weight_bytes + copies
    assert 8 * rank_weight_bytes(model, 8) < model.weight_bytes + copies


def test_activations_come_from_the_graph_where_they_are_more_than_stated() -> None:
    stated, model = load_profile("h200/spec"), load_model("Qwen/Qwen2.5-7B")
    unstated = replace(stated, memory=replace(stated.memory, activation_bytes=0))
    small, large = StepSizes(256, 256, 256), StepSizes(8192, 256, 256)
    assert kv_capacity_tokens(stated, model, 1, largest_step=small) == kv_capacity_tokens(stated, model, 1)
    freed = kv_capacity_tokens(unstated, model, 1, largest_step=small) - kv_capacity_tokens(
        unstated, model, 1, largest_step=large
    )
    difference = activation_bytes(model, 1, large) - activation_bytes(model, 1, small)
    assert freed == pytest.approx(difference / model.kv_bytes_per_token, abs=1)
    huge = StepSizes(80_000, 256, 256)
    assert kv_capacity_tokens(stated, model, 1, largest_step=huge) < kv_capacity_tokens(stated, model, 1)


def test_activations_grow_with_the_step_and_shrink_with_ranks() -> None:
    model = load_model("meta-llama/Llama-3.1-8B")
    once, twice = (activation_bytes(model, 1, StepSizes(size, 8, 8)) for size in (4096, 8192))
    assert twice == pytest.approx(2 * once, rel=0.01)
    assert activation_bytes(model, 4, StepSizes(4096, 8, 8)) < once
    # Gate, up and their product beside the residual: the widest moment of a dense layer, in bf16.
    assert once == 4096 * 2 * (3 * 14336 + 4096)
