"""For which numbers of sequences decode steps are captured."""

from bisect import bisect_left

_SMALL = (1, 2, 4)
_STRIDE = 8
_STRIDE_OF_MANY = 16
_MANY = 256
NUM_SEQS_CAPTURED_MAX = 512
"""Beyond it the device is busy for longer than the host takes to launch a step."""


def captured_sizes(num_seqs_max: int) -> tuple[int, ...]:
    """1, 2, 4, then every eighth, from 256 on every sixteenth; ``num_seqs_max``, if not beyond, is the last."""
    last = min(num_seqs_max, NUM_SEQS_CAPTURED_MAX)
    regular = (*_SMALL, *range(_STRIDE, _MANY, _STRIDE), *range(_MANY, last, _STRIDE_OF_MANY))
    return (*(size for size in regular if size < last), last)


def smallest_size(sizes: tuple[int, ...], num_seqs: int) -> int:
    """The first of the rising ``sizes`` that holds so many; 0 where none does."""
    index = bisect_left(sizes, num_seqs)
    return sizes[index] if index < len(sizes) else 0
