"""Tiny random models of each family, as transformers makes and saves them."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from paged_batches import PagedCache

from backends.lowering.lower import lower
from backends.lowering.program import GraphProgram
from backends.operators.registry import KernelRegistry
from backends.weights.checkpoint import Checkpoint
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
from sagellm.models.config_file import read_model_config
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph

VOCAB_SIZE = 97
NUM_POSITIONS = 128

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": NUM_POSITIONS,
    "initializer_range": 0.2,  # so that layers matter
    "dtype": torch.float32,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**_SIZES),
    "llama-llama3-rope-tied": transformers.LlamaConfig(
        **{**_SIZES, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}
    ),
    "llama-biased": transformers.LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**_SIZES, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**_SIZES),
    "qwen2-half-sliding": transformers.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**_SIZES, head_dim=16),
    "qwen3-moe": transformers.Qwen3MoeConfig(
        **_SIZES, head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "qwen3-moe-mixed": transformers.Qwen3MoeConfig(
        **_SIZES, head_dim=16, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=32, mlp_only_layers=[1]
    ),
    "opt": transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=80,
        num_hidden_layers=3,
        num_attention_heads=8,
        max_position_embeddings=NUM_POSITIONS,
        init_std=0.2,
        dropout=0.0,
        dtype=torch.float32,
    ),
}


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model of transformers, and the folder that it was saved to."""

    reference: transformers.PreTrainedModel
    folder: Path

    def graph(self, tp: int = 1) -> ExecutionGraph:
        return build_graph(read_model_config(self.folder / "config.json"), tp)

    def program(self, graph: ExecutionGraph | None = None) -> GraphProgram:
        graph = graph or self.graph()
        weights = load_weights(graph, Checkpoint(self.folder), rank=0, device="cpu", progress=NoProgress())
        return lower(graph, weights, kernels=KernelRegistry(), backend="cpu", device="cpu", num_positions=NUM_POSITIONS)

    def cache(self, block_size: int = 4, seed: int = 0, tp: int = 1) -> PagedCache:
        """An empty cache with the heads of one rank of ``tp``."""
        config = self.reference.config
        num_heads = config.num_attention_heads
        return PagedCache(
            num_layers=config.num_hidden_layers,
            num_blocks=NUM_POSITIONS,
            block_size=block_size,
            num_kv_heads=max(1, getattr(config, "num_key_value_heads", num_heads) // tp),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            seed=seed,
        )

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """transformers' logits of every position: [len(token_ids), vocab_size]."""
        with torch.no_grad():
            logits: torch.Tensor = self.reference(torch.tensor([token_ids])).logits[0]
        return logits


def make_tiny_model(name: str, folder: Path) -> TinyModel:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])  # saving a model writes its type into the configuration
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # Biases and norms begin as zeros and ones, which would hide that they are left out.
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".bias") or parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return TinyModel(model, folder)
