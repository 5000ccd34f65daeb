"""Noise that makes the largest logit a draw from the softmax, computed from a hash and nothing else.

A token's noise depends on the request's seed, the position in its output and the token id. So a draw is
the same whatever else is in the batch, however a prompt was cut, after a preemption and on any instance.
Source of the trick: Gumbel, Statistical theory of extreme values (1954); argmax(logit + G) draws from the
softmax where G are independent Gumbel variables, and G = -log(E) for E exponential.
"""

import torch

_TOKEN_FACTOR = 0x9E3779B1 - (1 << 32)
_MIX_1 = 0x85EBCA6B - (1 << 32)
_MIX_2 = 0xC2B2AE35 - (1 << 32)
_BELOW_ONE = 1.0 - 2.0**-24


def token_hashes(vocab_size: int, device: torch.device) -> torch.Tensor:
    """[vocab_size] int32: what `exponential_noise` starts from; to be made once."""
    products = torch.arange(vocab_size, dtype=torch.int64, device=device) * (_TOKEN_FACTOR & 0xFFFF_FFFF)
    return products.to(torch.int32)


def exponential_noise(hashes: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Independent standard exponential variables, [num_rows, vocab_size] float32.

    ``hashes`` are `token_hashes`, ``keys`` is [2, num_rows] int32. The mixing is MurmurHash3's finaliser
    (Appleby, public domain), keyed before its first and its second multiplication.
    """
    bits = hashes + keys[0].unsqueeze(1)
    bits.bitwise_xor_(_shifted(bits, 16))
    bits.mul_(_MIX_1)
    bits.bitwise_xor_(keys[1].unsqueeze(1))
    bits.bitwise_xor_(_shifted(bits, 13))
    bits.mul_(_MIX_2)
    bits.bitwise_xor_(_shifted(bits, 16))
    # A draw hangs on the smallest of these, and floats resolve all bits of a small magnitude.
    uniform = bits.to(torch.float32).abs_().add_(0.5).mul_(2.0**-31).clamp_(max=_BELOW_ONE)
    return uniform.neg_().log1p_().neg_()


def _shifted(bits: torch.Tensor, num_bits: int) -> torch.Tensor:
    """A logical shift to the right of int32."""
    return (bits >> num_bits).bitwise_and_((1 << (32 - num_bits)) - 1)
