"""For which numbers of sequences decode steps are captured."""

from bisect import bisect_left

_SMALL = (1, 2, 4)
_STRIDE = 8
_STRIDE_OF_MANY = 16
_MANY = 256
_TOKENS_LEAST = 16
_TOKENS_STRIDE = 32
_TOKENS_STRIDE_OF_MANY = 64
_TOKENS_MANY = 512
NUM_TOKENS_CAPTURED_MAX = 2048
"""Of steps with prompts. Longer ones keep the device busy for longer than the host takes to launch them."""
_WORTH_A_SIZE = 1.02  # of the duration of a larger one; less is noise
NUM_SEQS_CAPTURED_MAX = 512
"""Beyond it the device is busy for longer than the host takes to launch a step."""


def captured_sizes(num_seqs_max: int) -> tuple[int, ...]:
    """1, 2, 4, then every eighth, from 256 on every sixteenth; ``num_seqs_max``, if not beyond, is the last."""
    last = min(num_seqs_max, NUM_SEQS_CAPTURED_MAX)
    regular = (*_SMALL, *range(_STRIDE, _MANY, _STRIDE), *range(_MANY, last, _STRIDE_OF_MANY))
    return (*(size for size in regular if size < last), last)


def mixed_sizes(num_tokens_max: int) -> tuple[int, ...]:
    """16, every 32nd, from 512 on every 64th; ``num_tokens_max``, if not beyond what is worth while, is the last."""
    last = min(num_tokens_max, NUM_TOKENS_CAPTURED_MAX)
    small = range(_TOKENS_STRIDE, _TOKENS_MANY, _TOKENS_STRIDE)
    regular = (_TOKENS_LEAST, *small, *range(_TOKENS_MANY, last, _TOKENS_STRIDE_OF_MANY))
    return (*(size for size in regular if size < last), last)


def smallest_size(sizes: tuple[int, ...], num_seqs: int) -> int:
    """The first of the rising ``sizes`` that holds so many; 0 where none does."""
    index = bisect_left(sizes, num_seqs)
    return sizes[index] if index < len(sizes) else 0


def sizes_worth_keeping(durations_s: dict[int, float]) -> tuple[int, ...]:
    """Of sizes and how long their steps take, those that no larger one beats; rising.

    A library's choice of kernels for one size can be worse than for the next: then a step is filled up that far.
    """
    kept: list[int] = []
    shortest_s = float("inf")
    for size in sorted(durations_s, reverse=True):
        if durations_s[size] < shortest_s * _WORTH_A_SIZE:
            kept.append(size)
            shortest_s = min(shortest_s, durations_s[size])
    return tuple(reversed(kept))
