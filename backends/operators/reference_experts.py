"""Mixture of experts in plain torch: which experts a token goes to, and what they make of it."""

import torch
import torch.nn.functional as functional


def moe_router(logits: torch.Tensor, *, experts_per_token: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's likeliest experts: their ids (int64) and shares, both [num_tokens, experts_per_token].

    ``logits`` is [num_tokens, num_experts]. A share is the softmax over all experts, in float32; with
    ``normalise`` a token's shares sum to 1.
    """
    shares, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), experts_per_token, dim=-1)
    if normalise:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return ids, shares.to(logits.dtype)


def moe_experts(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Each token through its experts' gated MLPs, summed by their shares: [num_tokens, hidden_size].

    ``gate_up`` is [num_experts, 2 * intermediate_size, hidden_size], the gate's rows before the up
    projection's; ``down`` is [num_experts, hidden_size, intermediate_size]. Under tensor parallelism the
    intermediate size is a rank's share, and the result a summand.
    """
    result = torch.zeros_like(x)
    for expert in torch.unique(ids).tolist():
        tokens, places = torch.where(ids == expert)
        gate, up = functional.linear(x[tokens], gate_up[expert]).chunk(2, dim=-1)
        output = functional.linear(functional.silu(gate) * up, down[expert])
        result.index_add_(0, tokens, (output * shares[tokens, places, None]).to(x.dtype))
    return result
