"""Mixture of experts in plain torch: which experts a token goes to, and what they make of it."""

import torch
import torch.nn.functional as functional


def moe_router(
    x: torch.Tensor, weight: torch.Tensor, *, top_k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's ``top_k`` experts, the likeliest first: weights [num_tokens, top_k], indexes (int64) likewise.

    ``weight`` is [num_experts, hidden_size]. With ``normalize`` a token's weights sum to 1.
    """
    scores = functional.linear(x, weight)
    weights, experts = torch.topk(torch.softmax(scores, dim=-1, dtype=torch.float32), top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(x.dtype), experts


def moe_experts(
    x: torch.Tensor,
    expert_weights: torch.Tensor,
    expert_indexes: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts, each a gated SiLU perceptron: [num_tokens, hidden_size].

    ``gate_up`` is [num_experts, 2 * intermediate_size, hidden_size], the gate's rows before the up
    projection's; ``down`` is [num_experts, hidden_size, intermediate_size]. Under tensor parallelism the
    intermediate size is a rank's share, and the result a summand.
    """
    result = torch.zeros_like(x)
    for expert in torch.unique(expert_indexes).tolist():
        tokens, places = torch.where(expert_indexes == expert)
        gate, up = functional.linear(x[tokens], gate_up[expert]).chunk(2, dim=-1)
        output = functional.linear(functional.silu(gate) * up, down[expert])
        result.index_add_(0, tokens, (output * expert_weights[tokens, places, None]).to(x.dtype))
    return result
