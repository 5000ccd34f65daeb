"""The score below which top_k, top_p and min_p cut a row's tail off, found by bisection instead of a sort.

Any number between the least score that is kept and the next one below it will do, so a few passes over the row
suffice: each counts and weighs the scores above three numbers, and a quarter of the interval is left.
"""

# ruff: noqa: N803, SIM102
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.
# Conditions on what is fixed stand alone: they decide what is compiled.

import torch
import triton
import triton.language as tl

_COLUMNS = 4096
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(row_logits, first, vocab_size, inverse_temperature, COLUMNS: tl.constexpr):
    """Scores of COLUMNS tokens from ``first`` on; -inf where there is none or it is no number."""
    token_ids = first + tl.arange(0, COLUMNS)
    raw = tl.load(row_logits + token_ids, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(raw == raw, raw, float("-inf")) * inverse_temperature


@triton.jit
def _extent(row_logits, vocab_size, inverse_temperature, COLUMNS: tl.constexpr):
    """The largest and the least finite score."""
    highest = tl.full((COLUMNS,), float("-inf"), dtype=tl.float32)
    lowest = tl.full((COLUMNS,), float("inf"), dtype=tl.float32)
    for first in tl.range(0, vocab_size, COLUMNS, num_stages=4):
        scores = _scores(row_logits, first, vocab_size, inverse_temperature, COLUMNS)
        highest = tl.maximum(highest, scores)
        lowest = tl.minimum(lowest, tl.where(scores == float("-inf"), float("inf"), scores))
    return tl.max(highest, axis=0), tl.min(lowest, axis=0)


@triton.jit
def _likelihood(row_logits, vocab_size, inverse_temperature, highest, floor, COLUMNS: tl.constexpr):
    """Of all scores not below the floor together; that of the highest is 1."""
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in tl.range(0, vocab_size, COLUMNS, num_stages=4):
        scores = _scores(row_logits, first, vocab_size, inverse_temperature, COLUMNS)
        sums += tl.where(scores >= floor, tl.exp2((scores - highest) * _LOG2_E), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _floor(
    row_logits, vocab_size, inverse_temperature, highest, low, wanted, WEIGHS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A number so that the scores not below it are the fewest that are ``wanted`` many, or weigh as much.

    Those not below ``low`` are enough. Equal scores are kept together.
    """
    high = highest + tl.maximum(tl.abs(highest), 1.0) * 1.2e-6  # at this number and above there is not enough
    goes_on = low < high
    while goes_on:
        step = (high - low) * 0.25
        first_cut, second_cut, third_cut = low + step, low + 2.0 * step, low + 3.0 * step
        first_sums = tl.zeros((COLUMNS,), dtype=tl.float32)
        second_sums = tl.zeros((COLUMNS,), dtype=tl.float32)
        third_sums = tl.zeros((COLUMNS,), dtype=tl.float32)
        least_inside = tl.full((COLUMNS,), float("inf"), dtype=tl.float32)
        most_inside = tl.full((COLUMNS,), float("-inf"), dtype=tl.float32)
        for first in tl.range(0, vocab_size, COLUMNS, num_stages=4):
            scores = _scores(row_logits, first, vocab_size, inverse_temperature, COLUMNS)
            weights = tl.exp2((scores - highest) * _LOG2_E) if WEIGHS else 1.0
            first_sums += tl.where(scores >= first_cut, weights, 0.0)
            second_sums += tl.where(scores >= second_cut, weights, 0.0)
            third_sums += tl.where(scores >= third_cut, weights, 0.0)
            is_inside = (scores >= low) & (scores < high)
            least_inside = tl.minimum(least_inside, tl.where(is_inside, scores, float("inf")))
            most_inside = tl.maximum(most_inside, tl.where(is_inside, scores, float("-inf")))
        is_first = tl.sum(first_sums, axis=0) >= wanted
        is_second = tl.sum(second_sums, axis=0) >= wanted
        is_third = tl.sum(third_sums, axis=0) >= wanted
        new_low = tl.where(is_third, third_cut, tl.where(is_second, second_cut, tl.where(is_first, first_cut, low)))
        new_high = tl.where(is_third, high, tl.where(is_second, third_cut, tl.where(is_first, second_cut, first_cut)))
        # Where one score is all that is undecided, it is the last one to keep.
        least, most = tl.min(least_inside, axis=0), tl.max(most_inside, axis=0)
        goes_on = (least < most) & ((new_low > low) | (new_high < high))
        low = tl.where(least == most, least, new_low)
        high = new_high
    return low


@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "min_ps"])
def _cutoff_floors(
    logits, temperatures, top_ks, top_ps, min_ps, floors, row_stride, vocab_size,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each row. min_p and top_k cut first, top_p what they leave."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row) if HAS_TOP_K else 0
    top_p = tl.load(top_ps + row) if HAS_TOP_P else 1.0
    min_p = tl.load(min_ps + row) if HAS_MIN_P else 0.0
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    floor = float("-inf")
    if (temperature > 0.0) & (has_top_k | (top_p < 1.0) | (min_p > 0.0)):
        inverse_temperature = 1.0 / temperature
        row_logits = logits + row * row_stride
        highest, lowest = _extent(row_logits, vocab_size, inverse_temperature, COLUMNS)
        if HAS_MIN_P:
            if min_p > 0.0:
                floor = highest + tl.log(min_p)
        if HAS_TOP_K:
            if has_top_k:
                wanted = tl.cast(top_k, tl.float32)
                found = _floor(row_logits, vocab_size, inverse_temperature, highest, lowest, wanted, False, COLUMNS)
                floor = tl.maximum(floor, found)
        if HAS_TOP_P:
            if top_p < 1.0:
                low = tl.maximum(floor, lowest)
                total = _likelihood(row_logits, vocab_size, inverse_temperature, highest, low, COLUMNS)
                wanted = tl.maximum(top_p * total, 1e-30)
                floor = _floor(row_logits, vocab_size, inverse_temperature, highest, low, wanted, True, COLUMNS)
    tl.store(floors + row, floor)


def cutoff_floors(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """[num_rows] float32: the least logit / temperature that may be drawn, -inf where nothing is cut off.

    For ``draw_tokens``, which says what the arguments are.
    """
    num_rows, vocab_size = logits.shape
    floors = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _cutoff_floors[(num_rows,)](
        logits,
        temperature,
        logits if top_k is None else top_k,
        logits if top_p is None else top_p,
        logits if min_p is None else min_p,
        floors,
        logits.stride(0),
        vocab_size,
        HAS_TOP_K=top_k is not None,
        HAS_TOP_P=top_p is not None,
        HAS_MIN_P=min_p is not None,
        COLUMNS=_COLUMNS,
        num_warps=16,
    )
    return floors
