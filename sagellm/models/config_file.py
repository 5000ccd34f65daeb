"""Reads a Hugging Face ``config.json`` into a ``ModelShape``."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sagellm.models.model_shape import ModelShape

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_type: str
    num_hidden_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(default=0, ge=0)
    torch_dtype: str | None = None
    dtype: str | None = None


class _LlamaLikeConfig(_Config):
    intermediate_size: int = Field(gt=0)
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


class _OptConfig(_Config):
    ffn_dim: int = Field(gt=0)
    word_embed_proj_dim: int | None = None
    tie_word_embeddings: bool = True
    do_layer_norm_before: bool = True
    enable_bias: bool = True


def read_model_config(path: Path, name: str | None = None) -> ModelShape:
    """The shape that a ``config.json`` describes; ``name`` is the folder's name where none is given.

    Raises ``ValueError`` (one sentence, naming file and field) where the file is no such configuration or
    the architecture is not a dense Llama, Mistral, Qwen2, Qwen3 or OPT.
    """
    name = name or path.resolve().parent.name
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a Hugging Face config.json") from error
    return parse_model_config(text, name, str(path))


def parse_model_config(text: str, name: str, origin: str) -> ModelShape:
    """As ``read_model_config``, from text; ``origin`` names the text in errors."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}, line {error.lineno}: not JSON ({error.msg}); give a config.json") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in (*LLAMA_LIKE, "opt"):
        known = ", ".join((*LLAMA_LIKE, "opt"))
        raise ValueError(f"{origin}: model_type is {model_type!r}, must be a dense decoder: one of {known}")
    try:
        if model_type == "opt":
            return _opt_shape(_OptConfig.model_validate(raw), name, origin)
        return _llama_like_shape(_LlamaLikeConfig.model_validate(raw), name, origin)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{origin}: {where}: {first['msg']} (it is {first['input']!r:.60})") from error


def _llama_like_shape(config: _LlamaLikeConfig, name: str, origin: str) -> ModelShape:
    heads = config.num_attention_heads
    return ModelShape(
        name=name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or _evenly(config.hidden_size, heads, origin),
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        qkv_bias=config.attention_bias or config.model_type == "qwen2",
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        qk_norm=config.model_type == "qwen3",
        max_model_len=config.max_position_embeddings,
        dtype_bytes=_dtype_bytes(config, origin),
    )


def _opt_shape(config: _OptConfig, name: str, origin: str) -> ModelShape:
    if config.word_embed_proj_dim not in (None, config.hidden_size) or not config.do_layer_norm_before:
        raise ValueError(f"{origin}: word_embed_proj_dim must be hidden_size, with norms before each block")
    return ModelShape(
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
        dtype_bytes=_dtype_bytes(config, origin),
    )


def _evenly(hidden_size: int, num_heads: int, origin: str) -> int:
    if hidden_size % num_heads:
        raise ValueError(f"{origin}: hidden_size is {hidden_size}, must be a multiple of {num_heads} attention heads")
    return hidden_size // num_heads


def _dtype_bytes(config: _Config, origin: str) -> int:
    dtype = config.dtype or config.torch_dtype or "bfloat16"
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"{origin}: torch_dtype is {dtype!r}, must be one of {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[dtype]
