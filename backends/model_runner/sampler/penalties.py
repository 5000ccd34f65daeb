"""Penalties for tokens that were there before. Only the logits of such tokens are touched."""

import torch


def penalise_repetition(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """Penalise logits [num_logit_rows, vocab_size] in place, for tokens of prompt and output.

    ``token_ids`` [num_rows, num_tokens_max] int64 are prompt and output of the logits' ``rows``, of which the first
    ``num_tokens`` count, at least one; ``repetition`` is [num_rows]. Source: Keskar et al., CTRL (2019).
    """
    is_known = torch.arange(token_ids.shape[1], device=logits.device) < num_tokens.unsqueeze(1)
    # Cells occur more than once, always with the same value: it makes no difference which is written last.
    cells = _cells(logits, rows, torch.where(is_known, token_ids, token_ids[:, :1]))
    values = logits.view(-1).take(cells)
    penalised = torch.where(values > 0, values / repetition.unsqueeze(1), values * repetition.unsqueeze(1))
    logits.view(-1).scatter_(0, cells.view(-1), penalised.view(-1))


def penalise_output(
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    num_tokens: torch.Tensor,
    num_prompt_tokens: torch.Tensor,
    penalties: torch.Tensor,
) -> None:
    """As `penalise_repetition`, for tokens of the output alone (OpenAI's API reference).

    ``penalties`` [2, num_rows] are presence, once for each token, and frequency, for each time that it occurs.
    """
    presence, frequency = penalties.unsqueeze(-1)
    position = torch.arange(token_ids.shape[1], device=logits.device)
    is_output = (position < num_tokens.unsqueeze(1)) & (position >= num_prompt_tokens.unsqueeze(1))
    # The last token stands in for those that are no output; where it is none itself, there is no output.
    last = token_ids.gather(1, (num_tokens - 1).unsqueeze(1))
    cells = _cells(logits, rows, torch.where(is_output, token_ids, last))
    flat = logits.view(-1)
    once = presence * (num_tokens > num_prompt_tokens).unsqueeze(1)
    flat.scatter_(0, cells.view(-1), (flat.take(cells) - once).view(-1))
    flat.scatter_add_(0, cells.view(-1), (is_output * -frequency).view(-1))


def _cells(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return token_ids + (rows * logits.shape[1]).unsqueeze(1)
