"""The score below which top_k, top_p and min_p cut a row's tail off, found by bisection instead of a sort.

Any number between the least score that is kept and the next one below it will do. Where few tokens come into
question they lie in registers. Else the row is gone through: once to count or weigh the scores above three numbers
that a sample suggests, and once more to gather the few between two of them.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import triton
import triton.language as tl

from backends.cuda.kernels.candidates import CANDIDATES_MAX, LOG2_E, cleaned, group_threshold

_SAMPLES = tl.constexpr(8192)
_SAMPLE_RUN = tl.constexpr(8)  # tokens that lie together: a sector of the memory
_SHARE_ERROR = tl.constexpr(0.02)  # of a share that the sample tells: nearly four standard deviations of a count's
_NEGLIGIBLE = tl.constexpr(104.0)  # below the highest score a token's likelihood is 0, and its race is lost


@triton.jit
def is_cut(temperature, top_k, top_p, min_p, vocab_size):
    """Whether a row's tail is cut off. top_k is 0 or the vocabulary's size for none, top_p 1 or more."""
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    return (temperature > 0.0) & (has_top_k | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def above(highest):
    """A number that no score reaches."""
    return highest + tl.maximum(tl.abs(highest), 1.0) * 1.2e-6


@triton.jit
def floor_among(scores, weights, wanted, low, high):
    """A number so that the scores not below it are the fewest whose weights are ``wanted`` or more.

    Those not below ``low`` are enough, or it is ``low``; those not below ``high`` are not. Equal scores are kept
    together.
    """
    goes_on = low < high
    while goes_on:
        middle = low + (high - low) * 0.5
        is_between = (middle > low) & (middle < high)
        weight = tl.sum(tl.where(scores >= middle, weights, 0.0), axis=0)
        is_enough = weight >= wanted
        low = tl.where(is_between & is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
        goes_on = is_between & (weight != wanted)
    return low


@triton.jit
def _row_scores(row_logits, first, vocab_size, inverse_temperature, COLUMNS: tl.constexpr):
    """Scores of COLUMNS tokens from ``first`` on; -inf where there is none or it is no number."""
    token_ids = first + tl.arange(0, COLUMNS)
    raw = tl.load(row_logits + token_ids, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    return cleaned(raw, inverse_temperature)


@triton.jit
def _weights(scores, highest, by_count):
    """``by_count``: all weigh 1, else as much as they are likely; the highest weighs 1."""
    return tl.where(by_count, 1.0, tl.exp2((scores - highest) * LOG2_E))


@triton.jit
def _weight_of_row(row_logits, vocab_size, inverse_temperature, highest, low, by_count, COLUMNS: tl.constexpr):
    """Of all scores not below ``low`` together."""
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in tl.range(0, vocab_size, COLUMNS, num_stages=4):
        scores = _row_scores(row_logits, first, vocab_size, inverse_temperature, COLUMNS)
        sums += tl.where(scores >= low, _weights(scores, highest, by_count), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _suggested_cuts(row_logits, vocab_size, inverse_temperature, highest, low, high, share, by_count):
    """Three numbers about the one above which this share of the row's weight lies, from tokens all over the row."""
    numbers = tl.arange(0, _SAMPLES)
    step = (vocab_size + _SAMPLES - 1) // _SAMPLES
    token_ids = numbers // _SAMPLE_RUN * (_SAMPLE_RUN * step) + numbers % _SAMPLE_RUN
    raw = tl.load(row_logits + token_ids, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    scores = cleaned(raw, inverse_temperature)
    weights = tl.where(scores >= low, _weights(scores, highest, by_count), 0.0)
    total = tl.sum(weights, axis=0)
    first_cut = group_threshold(scores, weights, (share + _SHARE_ERROR) * total)
    second_cut = group_threshold(scores, weights, share * total)
    third_cut = group_threshold(scores, weights, (share - _SHARE_ERROR) * total)
    first_cut = tl.minimum(tl.maximum(first_cut, low), high)
    second_cut = tl.minimum(tl.maximum(second_cut, first_cut), high)
    return first_cut, second_cut, tl.minimum(tl.maximum(third_cut, second_cut), high)


@triton.jit
def _gather_between(
    row_logits, vocab_size, inverse_temperature, low, high, found, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write the row's scores from ``low`` to below ``high`` to found, at most CANDIDATES_MAX; count them all."""
    num_found = tl.zeros([], dtype=tl.int32)
    for first in tl.range(0, vocab_size, COLUMNS, num_stages=4):
        scores = _row_scores(row_logits, first, vocab_size, inverse_temperature, COLUMNS)
        is_found = (scores >= low) & (scores < high)
        ones = is_found.to(tl.int32)
        ends = num_found + tl.cumsum(ones, axis=0)
        tl.store(found + ends - 1, scores, mask=is_found & (ends <= CANDIDATES_MAX))
        num_found += tl.sum(ones, axis=0)
    tl.debug_barrier()
    return num_found


@triton.jit
def _floor_between(
    row_logits, vocab_size, inverse_temperature, highest, low, high, wanted, by_count, found, COLUMNS: tl.constexpr
):  # fmt: skip
    """As `floor_among`, of the row's scores from ``low`` to below ``high``: ``low`` where they are too many."""
    num_found = _gather_between(row_logits, vocab_size, inverse_temperature, low, high, found, COLUMNS)
    if num_found <= CANDIDATES_MAX:
        places = tl.arange(0, CANDIDATES_MAX)
        scores = tl.load(found + places, mask=places < num_found, other=float("-inf"))
        weights = tl.where(places < num_found, _weights(scores, highest, by_count), 0.0)
        low = floor_among(scores, weights, wanted, low, high)
    return low


@triton.jit
def _floor_by_passes(
    row_logits, vocab_size, inverse_temperature, highest, low, total, wanted, by_count, found, COLUMNS: tl.constexpr
):  # fmt: skip
    """As `floor_among`, of the whole row; what is not below ``low`` weighs ``total``.

    The first three numbers come from a sample: nearly always two of them enclose the floor, closely enough for the
    scores between them to be gathered in ``found``. Where they do not, each pass leaves a quarter.
    """
    high = above(highest)  # at this number and above there is not enough
    low_sum, high_sum = total, tl.zeros([], dtype=tl.float32)
    first_cut, second_cut, third_cut = _suggested_cuts(
        row_logits, vocab_size, inverse_temperature, highest, low, high, wanted / total, by_count
    )
    is_decided = low_sum < wanted
    has_passed = False
    goes_on = is_decided == 0
    while goes_on:
        first_sums = tl.zeros((COLUMNS,), dtype=tl.float32)
        second_sums = tl.zeros((COLUMNS,), dtype=tl.float32)
        third_sums = tl.zeros((COLUMNS,), dtype=tl.float32)
        least_inside = tl.full((COLUMNS,), float("inf"), dtype=tl.float32)
        most_inside = tl.full((COLUMNS,), float("-inf"), dtype=tl.float32)
        for first in tl.range(0, vocab_size, COLUMNS, num_stages=4):
            scores = _row_scores(row_logits, first, vocab_size, inverse_temperature, COLUMNS)
            weights = _weights(scores, highest, by_count)
            first_sums += tl.where(scores >= first_cut, weights, 0.0)
            second_sums += tl.where(scores >= second_cut, weights, 0.0)
            third_sums += tl.where(scores >= third_cut, weights, 0.0)
            is_inside = (scores >= low) & (scores < high)
            least_inside = tl.minimum(least_inside, tl.where(is_inside, scores, float("inf")))
            most_inside = tl.maximum(most_inside, tl.where(is_inside, scores, float("-inf")))
        first_sum, second_sum = tl.sum(first_sums, axis=0), tl.sum(second_sums, axis=0)
        third_sum = tl.sum(third_sums, axis=0)
        is_first, is_second, is_third = first_sum >= wanted, second_sum >= wanted, third_sum >= wanted
        new_low = tl.where(is_third, third_cut, tl.where(is_second, second_cut, tl.where(is_first, first_cut, low)))
        new_high = tl.where(is_third, high, tl.where(is_second, third_cut, tl.where(is_first, second_cut, first_cut)))
        low_sum = tl.where(is_third, third_sum, tl.where(is_second, second_sum, tl.where(is_first, first_sum, low_sum)))
        high_sum = tl.where(
            is_third, high_sum, tl.where(is_second, third_sum, tl.where(is_first, second_sum, first_sum))
        )
        # Where one score is all that is undecided, it is the last one to keep.
        least, most = tl.min(least_inside, axis=0), tl.max(most_inside, axis=0)
        is_decided = (least >= most) | (has_passed & (new_low == low) & (new_high == high))
        low = tl.where(least == most, least, new_low)
        high = new_high
        fits = low_sum - high_sum <= 0.9 * CANDIDATES_MAX * _weights(low, highest, by_count)
        goes_on = (is_decided | fits) == 0
        has_passed = True
        step = (high - low) * 0.25
        first_cut, second_cut, third_cut = low + step, low + 2.0 * step, low + 3.0 * step
    if is_decided == 0:
        low = _floor_between(
            row_logits, vocab_size, inverse_temperature, highest, low, high, wanted - high_sum, by_count, found, COLUMNS
        )
    return low


@triton.jit
def floor_of_row(
    row_logits, vocab_size, inverse_temperature, highest, floor, top_k, top_p, total, found, COLUMNS: tl.constexpr
):  # fmt: skip
    """The floor of a row of which many tokens come into question; ``floor`` is that of min_p.

    ``total`` is the likelihood of the whole row, that of the highest being 1; ``found`` has room for CANDIDATES_MAX.
    """
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    is_whole = (floor == float("-inf")) & (has_top_k == 0)
    for stage in range(2):
        by_count = stage == 0
        if (by_count & has_top_k) | ((stage == 1) & (top_p < 1.0)):
            low = tl.maximum(floor, highest - _NEGLIGIBLE)
            weight = total
            if is_whole == 0:
                weight = _weight_of_row(row_logits, vocab_size, inverse_temperature, highest, low, by_count, COLUMNS)
            wanted = tl.where(by_count, tl.cast(top_k, tl.float32), tl.maximum(top_p * weight, 1e-30))
            floor = _floor_by_passes(
                row_logits, vocab_size, inverse_temperature, highest, low, weight, wanted, by_count, found, COLUMNS
            )
    return floor
