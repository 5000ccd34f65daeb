"""Where the tail of a distribution is cut off."""

import torch


def min_p_floor(logits: torch.Tensor, log_min_p: torch.Tensor) -> torch.Tensor:
    """[num_rows, 1]: the logit of a token that is min_p times as likely as the most likely one.

    Source: Nguyen et al., Turning up the heat: min-p sampling (2024).
    """
    return logits.amax(1, keepdim=True) + log_min_p.unsqueeze(1)


def top_floor(candidates: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[num_rows, 1]: the smallest logit that top_k, and then top_p among what that leaves, let through.

    ``candidates`` [num_rows, num_candidates] are the largest logits in falling order, at least top_k of them.
    top_p keeps the smallest set of the most likely tokens that has at least this probability (Holtzman et
    al., The curious case of neural text degeneration, 2020). Tokens as likely as the last one kept are kept.
    """
    kth = candidates.gather(1, (top_k - 1).unsqueeze(1))
    within_k = candidates.masked_fill(candidates < kth, -torch.inf)
    probabilities = within_k.softmax(1)
    likelier = probabilities.cumsum(1) - probabilities
    num_kept = (likelier < top_p.unsqueeze(1)).sum(1, keepdim=True).clamp(min=1)
    return torch.maximum(kth, candidates.gather(1, num_kept - 1))
