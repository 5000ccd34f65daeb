"""Mixture of experts in plain torch: which experts a token goes to, and what they make of it."""

import torch
import torch.nn.functional as functional

# Up to here a step of a large model reads nearly all experts anyway, and that takes longer than to use them.
_TOKENS_AT_ONCE_MAX = 256


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
    if x.device.type != "cpu" and x.shape[0] <= _TOKENS_AT_ONCE_MAX:
        return experts_at_once(x, ids, shares, gate_up, down)
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and _rows_are_aligned(gate_up, down):
        return experts_in_groups(x, ids, shares, gate_up, down)
    return experts_in_turn(x, ids, shares, gate_up, down)


def experts_in_turn(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Every expert that is wanted, for its tokens only. The host waits to hear which those are."""
    result = torch.zeros_like(x)
    for expert in torch.unique(ids).tolist():
        tokens, places = torch.where(ids == expert)
        gate, up = functional.linear(x[tokens], gate_up[expert]).chunk(2, dim=-1)
        output = functional.linear(functional.silu(gate) * up, down[expert])
        result.index_add_(0, tokens, (output * shares[tokens, places, None]).to(x.dtype))
    return result


def experts_in_groups(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Tokens sorted by expert, and one product over all groups. The host need not wait where torch has a kernel for
    that (CUDA from compute capability 9.0 on, in bfloat16); elsewhere torch itself goes from expert to expert.
    """
    num_tokens, experts_per_token = ids.shape
    sorted_ids, order = ids.flatten().sort(stable=True)
    experts = torch.arange(gate_up.shape[0], device=ids.device)
    ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    rows = x.index_select(0, order // experts_per_token)
    gate, up = functional.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    outputs = functional.grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    of_tokens = torch.empty_like(outputs).index_copy_(0, order, outputs).view(num_tokens, experts_per_token, -1)
    return torch.matmul(shares.unsqueeze(1), of_tokens).squeeze(1)


def _rows_are_aligned(*weights: torch.Tensor) -> bool:
    """Grouped products want rows of a multiple of 16 bytes."""
    return all(weight.shape[-1] * weight.element_size() % 16 == 0 for weight in weights)


def experts_at_once(
    x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Every expert for every token, those that it was not sent to with no share. The host need not wait."""
    share_by_expert = x.new_zeros(x.shape[0], gate_up.shape[0]).scatter_add_(1, ids, shares)
    gate, up = torch.matmul(x, gate_up.transpose(1, 2)).chunk(2, dim=-1)
    weighted = functional.silu(gate) * up * share_by_expert.t().unsqueeze(-1)
    return torch.matmul(weighted, down.transpose(1, 2)).sum(0)
