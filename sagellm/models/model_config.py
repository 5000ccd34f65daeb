"""All that running a model needs to know of it, beside its weights."""

from dataclasses import dataclass
from typing import Literal

from sagellm.models.model_shape import ModelShape
from sagellm.models.rope import Rope

PLAIN_ROPE = Rope()
Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "opt"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only model as its ``config.json`` describes it.

    The fields beside ``shape`` have no part in prices and memory, so a configuration with their defaults
    is enough for those. Raises ``ValueError`` where ``sliding_windows`` are not one for each layer.
    """

    shape: ModelShape
    family: Family = "llama"
    dtype: str = "bfloat16"  # bfloat16 | float16 | float32
    norm_eps: float = 1e-6
    rope: Rope | None = PLAIN_ROPE  # None: learned positions
    sliding_windows: tuple[int, ...] = ()  # tokens that each layer looks back; 0: all of them; (): 0 everywhere
    normalise_expert_shares: bool = True
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.sliding_windows and len(self.sliding_windows) != self.shape.num_layers:
            raise ValueError(
                f"{self.shape.name}: sliding_windows are {len(self.sliding_windows)}, "
                f"must be one for each of {self.shape.num_layers} layers"
            )

    @property
    def max_model_len(self) -> int:
        """Longest context that the configuration states; 0: not stated."""
        return self.shape.max_model_len

    def sliding_window(self, layer: int) -> int:
        """Tokens that ``layer`` looks back; 0: all of them."""
        return self.sliding_windows[layer] if self.sliding_windows else 0


def config_of_shape(shape: ModelShape) -> ModelConfig:
    """A configuration of that shape, for prices and memory."""
    dtype = "float32" if shape.dtype_bytes == 4 else "bfloat16"
    if not shape.gated_mlp:
        return ModelConfig(shape, "opt", dtype, rope=None)
    return ModelConfig(shape, "qwen3_moe" if shape.num_experts else "llama", dtype)
