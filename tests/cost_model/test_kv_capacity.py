"""What fits beside the weights."""

import pytest

from backends.profile_files import load_profile
from sagellm.cost_model.kv_capacity import kv_capacity_blocks, kv_capacity_tokens
from sagellm.models.known_models import load_model

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
