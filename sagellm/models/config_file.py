"""Reads a Hugging Face ``config.json`` into a ``ModelConfig``."""

import json
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from sagellm.models.config_schema import CommonFields, ExpertFields, LlamaLikeFields, OptFields
from sagellm.models.model_config import Family, ModelConfig
from sagellm.models.model_shape import ModelShape
from sagellm.models.rope_reading import read_rope

FAMILIES: tuple[Family, ...] = get_args(Family)
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def read_model_config(path: Path, name: str | None = None) -> ModelConfig:
    """The model that a ``config.json`` describes; ``name`` is the folder's name where none is given.

    Raises ``ValueError`` (one sentence, naming file and field) where the file is no such configuration or
    the architecture is none of ``FAMILIES``.
    """
    name = name or path.resolve().parent.name
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a Hugging Face config.json") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; give a Hugging Face config.json") from error
    return parse_model_config(text, name, str(path))


def parse_model_config(text: str, name: str, origin: str) -> ModelConfig:
    """As ``read_model_config``, from text; ``origin`` names the text in errors."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}, line {error.lineno}: not JSON ({error.msg}); give a config.json") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in FAMILIES:
        raise ValueError(f"{origin}: model_type is {model_type!r}, must be a decoder: one of {', '.join(FAMILIES)}")
    try:
        if model_type == "opt":
            return _opt_config(OptFields.model_validate(raw), name, origin)
        if model_type == "qwen3_moe":
            return _llama_like_config(ExpertFields.model_validate(raw), name, origin)
        return _llama_like_config(LlamaLikeFields.model_validate(raw), name, origin)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{origin}: {where}: {first['msg']} (it is {first['input']!r:.60})") from error


def _check_plain(config: CommonFields, origin: str) -> None:
    if config.quantization_config:
        method = config.quantization_config.get("quant_method")
        raise ValueError(f"{origin}: quantization_config states {method!r}, quantised checkpoints are not supported")


def _llama_like_config(config: LlamaLikeFields, name: str, origin: str) -> ModelConfig:
    _check_plain(config, origin)
    if config.hidden_act != "silu":
        raise ValueError(f"{origin}: hidden_act is {config.hidden_act!r}, must be 'silu'")
    return ModelConfig(
        shape=_llama_like_shape(config, name, origin),
        family=_family(config),
        dtype=_dtype(config, origin),
        norm_eps=config.rms_norm_eps,
        rope=read_rope(config, origin),
        sliding_windows=_sliding_windows(config, origin),
        normalise_expert_shares=config.norm_topk_prob if isinstance(config, ExpertFields) else True,
        eos_token_ids=_eos_token_ids(config),
        bos_token_id=config.bos_token_id,
    )


def _llama_like_shape(config: LlamaLikeFields, name: str, origin: str) -> ModelShape:
    heads, family = config.num_attention_heads, _family(config)
    # Only these families read the fields; the others' files may carry them without effect.
    attention_bias = config.attention_bias and family in ("llama", "qwen3", "qwen3_moe")
    head_dim = config.head_dim or (128 if family == "qwen3" else _evenly(config.hidden_size, heads, origin))
    if head_dim % 2:
        raise ValueError(f"{origin}: head_dim is {head_dim}, must be even for rotary embedding")
    experts = config if isinstance(config, ExpertFields) else None
    return ModelShape(
        name=name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=config.mlp_bias and family == "llama",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        max_model_len=config.max_position_embeddings,
        dtype_bytes=_DTYPE_BYTES[_dtype(config, origin)],
        num_experts=experts.num_experts if experts else 0,
        experts_per_token=experts.num_experts_per_tok if experts else 0,
        expert_intermediate_size=experts.moe_intermediate_size if experts else 0,
        dense_layers=_dense_layers(experts) if experts else (),
    )


def _dense_layers(config: ExpertFields) -> tuple[int, ...]:
    """Layers with one MLP instead of experts."""
    stated = config.mlp_only_layers or []
    return tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer in stated or (layer + 1) % config.decoder_sparse_step
    )


def _sliding_windows(config: LlamaLikeFields, origin: str) -> tuple[int, ...]:
    family, window, num_layers = _family(config), config.sliding_window or 0, config.num_hidden_layers
    if family == "llama" or (family.startswith("qwen") and not config.use_sliding_window):
        window = 0
    if not window:
        return ()
    if family in ("mistral", "qwen3_moe"):
        return (window,) * num_layers
    if config.layer_types is None:
        return tuple(window if layer >= config.max_window_layers else 0 for layer in range(num_layers))
    if len(config.layer_types) != num_layers:
        raise ValueError(f"{origin}: layer_types are {len(config.layer_types)}, must be one for each of {num_layers}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in config.layer_types)


def _opt_config(config: OptFields, name: str, origin: str) -> ModelConfig:
    _check_plain(config, origin)
    if config.word_embed_proj_dim not in (None, config.hidden_size) or not config.do_layer_norm_before:
        raise ValueError(f"{origin}: word_embed_proj_dim must be hidden_size, with norms before each block")
    if config.activation_function != "relu":
        raise ValueError(f"{origin}: activation_function is {config.activation_function!r}, must be 'relu'")
    shape = ModelShape(
        name=name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=_evenly(config.hidden_size, config.num_attention_heads, origin),
        intermediate_size=config.ffn_dim,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        gated_mlp=False,
        qkv_bias=config.enable_bias,
        output_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        norm_bias=True,
        num_position_embeddings=config.max_position_embeddings + 2,  # OPT keeps two positions free for padding
        max_model_len=config.max_position_embeddings,
        dtype_bytes=_DTYPE_BYTES[_dtype(config, origin)],
    )
    return ModelConfig(
        shape,
        "opt",
        _dtype(config, origin),
        norm_eps=1e-5,
        rope=None,
        eos_token_ids=_eos_token_ids(config),
        bos_token_id=config.bos_token_id,
    )


def _family(config: CommonFields) -> Family:
    return next(family for family in FAMILIES if family == config.model_type)


def _eos_token_ids(config: CommonFields) -> tuple[int, ...]:
    stated = config.eos_token_id
    return () if stated is None else (stated,) if isinstance(stated, int) else tuple(stated)


def _evenly(hidden_size: int, num_heads: int, origin: str) -> int:
    if hidden_size % num_heads:
        raise ValueError(f"{origin}: hidden_size is {hidden_size}, must be a multiple of {num_heads} attention heads")
    return hidden_size // num_heads


def _dtype(config: CommonFields, origin: str) -> str:
    dtype = config.dtype or config.torch_dtype or "bfloat16"
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"{origin}: torch_dtype is {dtype!r}, must be one of {', '.join(_DTYPE_BYTES)}")
    return dtype
