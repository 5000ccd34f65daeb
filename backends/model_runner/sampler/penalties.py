"""Penalties for tokens that were there before."""

import torch


def apply_penalties(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    num_prompt_tokens: torch.Tensor,
    penalties: torch.Tensor,
) -> torch.Tensor:
    """Penalised logits, [num_rows, vocab_size], in place.

    ``token_ids`` [num_rows, num_tokens_max] int64 are prompt and output, of which the first ``num_tokens``
    count; ``penalties`` [3, num_rows] are repetition, presence and frequency. Repetition looks at prompt and
    output (Keskar et al., CTRL, 2019); presence and frequency at the output (OpenAI's API reference).
    """
    repetition, presence, frequency = penalties.unsqueeze(-1)
    position = torch.arange(token_ids.shape[1], device=logits.device)
    is_known = position < num_tokens.unsqueeze(1)
    is_output = is_known & (position >= num_prompt_tokens.unsqueeze(1))
    token_ids = token_ids.clamp(0, logits.shape[1] - 1)  # what lies behind a sequence may be anything
    counts = torch.zeros_like(logits).scatter_add_(1, token_ids, is_known.to(logits.dtype))
    scale = torch.where(logits > 0, 1 / repetition, repetition)
    logits.mul_(torch.where(counts > 0, scale, 1.0))
    counts.zero_().scatter_add_(1, token_ids, is_output.to(logits.dtype))
    logits.sub_(counts * frequency)
    return logits.sub_((counts > 0) * presence)
