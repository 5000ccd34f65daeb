"""Cosines and sines of rotary position embeddings, computed once for a model."""

import torch

from sagellm.models.rope import Rope


def rotary_table(rope: Rope, head_dim: int, num_positions: int, device: torch.device | str) -> torch.Tensor:
    """float32 [num_positions, head_dim]: head_dim / 2 cosines, then as many sines, of each position's angles."""
    frequencies = torch.tensor(rope.inverse_frequencies(head_dim), dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor
