"""Where the noise of a draw comes from: two integers for each seed and output position."""

import numpy as np

from backends.model_runner.packed_arrays import Array

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def noise_keys(seeds: Array, positions: Array) -> Array:
    """[2, n] int32 from seeds [n] uint64 and positions [n] int64: SplitMix64 of both.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014).
    """
    state = _mixed(seeds + _GOLDEN_GAMMA)
    keys = _mixed(state + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN_GAMMA)
    return np.ascontiguousarray(keys.view(np.int32).reshape(-1, 2).T)


def _mixed(state: Array) -> Array:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    mixed: Array = state ^ (state >> np.uint64(31))
    return mixed
