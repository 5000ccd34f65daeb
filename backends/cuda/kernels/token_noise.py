"""The noise that makes the largest score a draw: that of ``backends.model_runner.sampler.gumbel_noise``, bit by bit."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Triton gives types to what a kernel takes.

import triton
import triton.language as tl


@triton.jit
def _mixed(state):
    """The finaliser of SplitMix64."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def noise_key(seed, position):
    """Of a draw, uint64: see ``sampler.noise_keys``."""
    state = _mixed(seed.to(tl.uint64) + 0x9E3779B97F4A7C15)
    return _mixed(state + (position.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)


@triton.jit
def exponentials(key, token_ids):
    """Standard exponential variables of tokens."""
    bits = token_ids.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = bits ^ (key >> 32).to(tl.uint32)
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    uniform = (tl.abs(bits.to(tl.int32, bitcast=True).to(tl.float32)) + 0.5) * 4.656612873077393e-10  # 2 ** -31
    uniform = tl.minimum(uniform, 0.99999994)  # 1 - 2 ** -24
    # The first terms of -log(1 - u), where 1 - u would lose the digits of a small u: the winners are small.
    near_zero = uniform * (1.0 + uniform * (0.5 + uniform * (0.33333334 + uniform * 0.25)))
    return tl.where(uniform < 0.015625, near_zero, -tl.log(1.0 - uniform))
