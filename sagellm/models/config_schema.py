"""The fields of a Hugging Face ``config.json`` that are read, as the file spells them."""

from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field


class CommonFields(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), defer_build=True)

    model_type: str
    num_hidden_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(default=0, ge=0)
    torch_dtype: str | None = None
    dtype: str | None = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    quantization_config: dict[str, object] | None = None


class RopeFields(BaseModel):
    """``rope_scaling`` of older files, ``rope_parameters`` of newer ones."""

    model_config = ConfigDict(extra="ignore", defer_build=True)

    rope_type: str = Field(default="default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: float | None = Field(default=None, gt=1)
    partial_rotary_factor: float | None = None
    factor: float | None = Field(default=None, gt=0)
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True


class LlamaLikeFields(CommonFields):
    intermediate_size: int = Field(gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=1)
    rope_scaling: RopeFields | None = None
    rope_parameters: RopeFields | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = Field(default=None, gt=0)
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None


class ExpertFields(LlamaLikeFields):
    num_experts: int = Field(gt=0, validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(default=1, gt=0)
    mlp_only_layers: list[int] | None = None


class OptFields(CommonFields):
    ffn_dim: int = Field(gt=0)
    word_embed_proj_dim: int | None = None
    tie_word_embeddings: bool = True
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    activation_function: str = "relu"
