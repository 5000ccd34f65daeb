"""What is read from a ``config.json``, against transformers, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sagellm.models.config_file import parse_model_config, read_model_config
from sagellm.models.known_models import known_model_ids, load_model, load_model_config
from sagellm.models.model_config import ModelConfig, config_of_shape
from sagellm.models.rope import Llama3Scaling, Rope, YarnScaling
from sagellm.runtime.execution_graph.builder import build_graph

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": 99,
    "rms_norm_eps": 3e-5,
    "max_position_embeddings": 640,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_theta=500.0),
        LlamaConfig(**SIZES, rope_theta=5000.0, rope_scaling=dict(LLAMA3), eos_token_id=[3, 5], bos_token_id=1),
        MistralConfig(**SIZES, sliding_window=33),
        MistralConfig(**SIZES, sliding_window=None),
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=3),
        Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=20, max_window_layers=0),
        Qwen3Config(**SIZES, attention_bias=True, rope_scaling=dict(YARN), tie_word_embeddings=True),
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=7, layer_types=["sliding_attention"] * 4),
        Qwen3MoeConfig(
            **SIZES,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_files_that_transformers_saves_are_read_alike(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    ours = read_model_config(tmp_path / "config.json")
    shape = ours.shape
    assert (ours.family, ours.norm_eps) == (config.model_type, config.rms_norm_eps)
    assert (shape.head_dim, shape.num_kv_heads, shape.vocab_size) == (16, 2, 99)
    assert (shape.tied_embeddings, ours.max_model_len) == (config.tie_word_embeddings, 640)
    assert ours.rope is not None
    assert ours.rope.theta == config.rope_parameters["rope_theta"]
    windows = [ours.sliding_window(layer) for layer in range(4)]
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 4
    window = config.sliding_window if getattr(config, "sliding_window", None) else 0
    assert windows == [window if kind == "sliding_attention" else 0 for kind in kinds]
    eos = config.eos_token_id
    assert list(ours.eos_token_ids) == ([] if eos is None else eos if isinstance(eos, list) else [eos])
    if config.model_type == "qwen3_moe":
        assert (shape.num_experts, shape.experts_per_token, shape.expert_intermediate_size) == (6, 2, 24)
        assert [layer for layer in range(4) if shape.has_experts(layer)] == [1]
        assert ours.normalise_expert_shares


@pytest.mark.parametrize(
    "parameters", [{"rope_type": "linear", "factor": 3.0}, LLAMA3, YARN, {**YARN, "beta_fast": 8.0}]
)
@pytest.mark.parametrize("theta", [10_000.0, 1e6])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_frequencies_are_those_of_transformers(parameters: dict[str, Any], theta: float, head_dim: int) -> None:
    config = LlamaConfig(**{**SIZES, "head_dim": head_dim}, rope_parameters={**parameters, "rope_theta": theta})
    theirs, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    text = json.dumps(
        {**SIZES, "head_dim": head_dim, "model_type": "llama", "rope_theta": theta, "rope_scaling": parameters}
    )
    rope = parse_model_config(text, "some", "some.json").rope
    assert rope is not None
    assert rope.inverse_frequencies(head_dim) == pytest.approx(theirs.tolist(), rel=1e-5)
    assert rope.attention_factor == pytest.approx(attention_factor)


def test_plain_frequencies_fall_from_one() -> None:
    frequencies = Rope(10_000.0).inverse_frequencies(8)
    assert frequencies == pytest.approx([1.0, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', must be a decoder: one of llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', must be 'silu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope_type is 'longrope', must be one of default"),
        ({"rope_scaling": {"type": "yarn"}}, "rope scaling of type yarn needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope scaling of type llama3 needs low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"model_type": "qwen3_moe"}, "num_experts: Field required"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_heads is 5|multiple of 5 attention heads"),
        ({"head_dim": 15}, "head_dim is 15, must be even"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config states 'awq'"),
        ({"torch_dtype": "float8"}, "torch_dtype is 'float8', must be one of float16"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: Input should be greater than 0"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
            "layer_types are 1, must be one for each of 4",
        ),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 4,
                "num_experts_per_tok": 5,
                "moe_intermediate_size": 8,
            },
            "experts_per_token is 5, must be 1 to 4 experts",
        ),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], words: str) -> None:
    text = json.dumps({**SIZES, "model_type": "llama", **changes})
    with pytest.raises(ValueError, match=words) as caught:
        parse_model_config(text, "some", "some.json")
    assert "\n" not in str(caught.value)


def test_known_models_have_what_their_checkpoints_have() -> None:
    llama = load_model_config("meta-llama/Llama-3.1-8B-Instruct")
    assert llama.rope == Rope(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert llama.norm_eps == 1e-5
    assert load_model_config("Qwen/Qwen2.5-7B").rope == Rope(1e6)
    assert load_model_config("sagellm/toy").dtype == "float32"


def test_yarn_scales_magnitudes_as_its_paper_says() -> None:
    text = json.dumps({**SIZES, "model_type": "qwen3", "rope_scaling": YARN})
    rope = parse_model_config(text, "some", "some.json").rope
    assert rope is not None
    assert isinstance(rope.scaling, YarnScaling)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1)


@pytest.mark.parametrize("name", known_model_ids())
def test_a_shape_alone_gives_the_graph_that_prices_need(name: str) -> None:
    """Same operators and shapes as from the whole configuration, but for constants without a price."""
    config, of_shape = load_model_config(name), config_of_shape(load_model(name))
    assert isinstance(of_shape, ModelConfig)
    whole, bare = build_graph(config, 1), build_graph(of_shape, 1)
    assert [(n.name, type(n.operator), n.inputs, n.outputs) for n in whole.nodes] == [
        (n.name, type(n.operator), n.inputs, n.outputs) for n in bare.nodes
    ]
    assert [(t.name, t.shape) for t in whole.tensors] == [(t.name, t.shape) for t in bare.tensors]
