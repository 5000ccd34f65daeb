"""The shape of a decoder model: all that prices and memory need to know of it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one decoder-only transformer, dense or with experts, as its public configuration gives them.

    Raises ``ValueError`` where a size is below 1, the query heads do not share the key-value heads evenly,
    or there are fewer experts than a token goes to.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool = False
    gated_mlp: bool = True  # gate and up projections, as in Llama; False: one up projection, as in OPT
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_bias: bool = False  # layer norm with scale and shift instead of RMS norm
    num_position_embeddings: int = 0  # learned positions; 0 for rotary
    max_model_len: int = 0  # longest context that the configuration states; 0: not stated
    dtype_bytes: int = 2  # of weights and of the KV cache
    num_experts: int = 0  # gated MLPs of which each token passes through some; 0: dense
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()  # layers with one MLP instead of experts

    def __post_init__(self) -> None:
        sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
        for field_name in (*sizes, "vocab_size", "dtype_bytes"):
            if getattr(self, field_name) < 1:
                raise ValueError(f"{self.name}: {field_name} is {getattr(self, field_name)}, must be 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: num_heads is {self.num_heads}, must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"{self.name}: experts_per_token is {self.experts_per_token}, must be 1 to {self.num_experts} experts"
            )
        if self.num_experts and self.expert_intermediate_size < 1:
            raise ValueError(
                f"{self.name}: expert_intermediate_size is {self.expert_intermediate_size}, must be 1 or more"
            )

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together; that of the value heads is the same."""
        return self.num_kv_heads * self.head_dim

    def has_experts(self, layer: int) -> bool:
        """Whether ``layer`` has experts instead of one MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def num_layer_parameters(self, layer: int) -> int:
        """Parameters of one layer."""
        hidden = self.hidden_size
        qkv_width = self.query_width + 2 * self.kv_width
        count = hidden * (qkv_width + self.query_width)
        count += 2 * hidden * (2 if self.norm_bias else 1)
        count += qkv_width if self.qkv_bias else 0
        count += hidden if self.output_bias else 0
        count += 2 * self.head_dim if self.qk_norm else 0
        return count + (self._num_expert_parameters if self.has_experts(layer) else self._num_mlp_parameters)

    @property
    def _num_mlp_parameters(self) -> int:
        up_width = self.intermediate_size * (2 if self.gated_mlp else 1)
        bias = up_width + self.hidden_size if self.mlp_bias else 0
        return self.hidden_size * (up_width + self.intermediate_size) + bias

    @property
    def _num_expert_parameters(self) -> int:
        """Of all experts of a layer and what chooses among them."""
        return self.num_experts * self.hidden_size * (3 * self.expert_intermediate_size + 1)

    @property
    def num_parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        final_norm = self.hidden_size * (2 if self.norm_bias else 1)
        positions = self.num_position_embeddings * self.hidden_size
        return embeddings + positions + final_norm + sum(map(self.num_layer_parameters, range(self.num_layers)))

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache of one token over all layers and all heads."""
        return 2 * self.num_layers * self.kv_width * self.dtype_bytes

    def kv_heads_per_rank(self, tp: int) -> int:
        """KV heads that one of ``tp`` ranks holds; heads are replicated where ranks outnumber them."""
        self.check_tp(tp)
        return max(1, self.num_kv_heads // tp)

    def costs_the_same_as(self, other: "ModelShape") -> bool:
        """Whether all sizes are equal; names and stated context lengths do not matter."""
        return replace(self, name="", max_model_len=0) == replace(other, name="", max_model_len=0)

    def check_tp(self, tp: int) -> None:
        """Raises ``ValueError`` where the heads cannot be shared among ``tp`` ranks."""
        if tp < 1 or self.num_heads % tp:
            raise ValueError(f"{self.name}: tp is {tp}, must divide its {self.num_heads} query heads")
        if max(self.num_kv_heads, tp) % min(self.num_kv_heads, tp):
            raise ValueError(
                f"{self.name}: tp is {tp}, must divide its {self.num_kv_heads} key-value heads or be a multiple"
            )
