"""Model shapes: published sizes, and clear words for files that are none."""

import json
from pathlib import Path

import pytest

from sagellm.models.config_file import parse_model_config, read_model_config
from sagellm.models.known_models import known_model_ids, load_model
from sagellm.models.model_shape import ModelShape

# Parameter counts of the public checkpoints (tensor element counts; tied embeddings once).
PUBLISHED_PARAMETERS = {
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "facebook/opt-13b": 12_853_473_280,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
}
OWN_PARAMETERS = {"sagellm/toy": 115_328, "sagellm/qwen3-100m": 100_094_208}
PUBLISHED_ROUNDED = {"facebook/opt-66b": 66e9}


def test_parameter_counts_are_the_published_ones() -> None:
    assert {*PUBLISHED_PARAMETERS, *PUBLISHED_ROUNDED, *OWN_PARAMETERS} == set(known_model_ids())
    for name, count in (PUBLISHED_PARAMETERS | OWN_PARAMETERS).items():
        assert load_model(name).num_parameters == count, name
    for name, rounded in PUBLISHED_ROUNDED.items():
        assert load_model(name).num_parameters == pytest.approx(rounded, rel=0.01)


def test_kv_bytes_of_a_grouped_query_model() -> None:
    assert load_model("Qwen/Qwen2.5-7B").kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert load_model("facebook/opt-13b").kv_bytes_per_token == 2 * 40 * 5120 * 2


@pytest.mark.parametrize(
    ("alias", "model_id"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
    ],
)
def test_tuned_variants_have_the_shape_of_their_base(alias: str, model_id: str) -> None:
    alias_shape = load_model(alias)
    assert alias_shape.costs_the_same_as(load_model(model_id))
    assert alias_shape.name == alias


def test_different_models_do_not_cost_the_same() -> None:
    assert not load_model("Qwen/Qwen2.5-7B").costs_the_same_as(load_model("Qwen/Qwen3-8B"))


def test_a_config_file_gives_the_shape_that_the_known_name_gives(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "rope_theta": 1e6,
    }
    path = tmp_path / "my-model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    for shape in (load_model(str(path)), load_model(str(path.parent)), read_model_config(path).shape):
        assert shape.name == "my-model"
        assert shape.costs_the_same_as(load_model("Qwen/Qwen2.5-7B"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "model_type is None"),
        ('{"model_type": "mixtral"}', "model_type is 'mixtral', must be a decoder"),
        ('{"model_type": "llama", "num_hidden_layers": 2}', "hidden_size: Field required"),
        ('{"model_type": "llama", "num_hidden_layers": -1}', "num_hidden_layers: Input should be greater than 0"),
    ],
)
def test_bad_configs_are_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"some\.json") as caught:
        parse_model_config(text, "some", "some.json")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        ModelShape("odd", 1, 8, 6, 4, 2, 8, 16)
    with pytest.raises(ValueError, match="tp is 3"):
        load_model("Qwen/Qwen3-8B").check_tp(3)
    # Qwen2.5-7B has four KV heads; on seven ranks they can neither be shared nor copied evenly.
    with pytest.raises(ValueError, match="key-value heads"):
        load_model("Qwen/Qwen2.5-7B").check_tp(7)


def test_kv_heads_are_copied_where_ranks_outnumber_them() -> None:
    assert load_model("Qwen/Qwen2.5-72B").kv_heads_per_rank(8) == 1
    assert load_model("meta-llama/Llama-3.1-70B").kv_heads_per_rank(16) == 1


def test_unknown_models_are_named_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="'gpt-9' is no known model") as caught:
        load_model("gpt-9")
    assert "Qwen/Qwen3-8B" in str(caught.value)
