"""Cosines and sines of rotary position embeddings, computed once for a model."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Stretches low frequencies for contexts longer than those of training, as Llama 3.1 does.

    Wavelengths above ``original_positions_max / low_frequency_factor`` grow by ``factor``, those below
    ``original_positions_max / high_frequency_factor`` stay, those between are interpolated.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions_max: int


def rotary_table(
    num_positions: int, head_dim: int, theta: float, scaling: Llama3Scaling | None, device: torch.device | str
) -> torch.Tensor:
    """float32 [num_positions, head_dim]: head_dim / 2 cosines, then as many sines, of each position's angles."""
    frequencies = inverse_frequencies(head_dim, theta, scaling).to(device)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def inverse_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> torch.Tensor:
    """float32 [head_dim / 2]: the angle by which each pair of elements turns from one position to the next."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents
    return frequencies if scaling is None else _stretched(frequencies, scaling)


def _stretched(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    smooth = ((scaling.original_positions_max / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
