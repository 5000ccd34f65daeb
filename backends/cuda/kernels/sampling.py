"""Draws a token for each row of logits: greedy, or from the softmax that temperature, min_p, top_k and top_p leave.

The draw is that of ``backends.model_runner.sampler``: the same hash of seed, output position and token id, so
that the same requests get the same tokens, but for ties that rounding decides. It is an exponential race: with
independent exponential E, the token of the least E / exp(score) is a draw from the softmax (Maddison et al. 2014,
A* sampling). The winner of a part of a row costs one logarithm for each token, and nothing is sorted. A row whose
tail is cut off runs its race among the tokens that are left, once a first pass has said where these can be.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.candidates import (
    CANDIDATE_GROUPS_MAX,
    CANDIDATES_MAX,
    GROUP,
    LOG2_E,
    cleaned,
    gather_candidates,
    gather_groups,
    group_maxima,
    group_threshold,
)
from backends.cuda.kernels.cutoff_floors import above, floor_among, floor_of_row, is_cut
from backends.cuda.kernels.kernel_launcher import KernelLauncher
from backends.cuda.kernels.token_noise import exponentials, noise_key

_COLUMNS = 4096
_PASS_COLUMNS = 2048
_REGISTERS_MAX = 128  # so that two rows are drawn on a multiprocessor at a time


@KernelLauncher
@triton.jit(do_not_specialize_on_alignment=["temperatures", "seeds", "positions", "top_ks", "top_ps", "min_ps"])
def _draw_parts(
    logits, temperatures, seeds, positions, top_ks, top_ps, min_ps, scratch,
    row_stride, vocab_size,
    HAS_CUTS: tl.constexpr, PARTS: tl.constexpr, ROW_WORDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each row and COLUMNS of its tokens: the best value there, its token, whether all are finite.

    Of a row that is cut: the largest score there, the likelihood of all, and the largest scores of groups.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token_ids = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = token_ids < vocab_size
    raw = tl.load(logits + row * row_stride + token_ids, mask=inside, other=0.0).to(tl.float32)
    is_finite = tl.abs(raw) < float("inf")
    raw = tl.where(inside, raw, float("-inf"))
    temperature = tl.load(temperatures + row)
    parts = scratch + row * ROW_WORDS + part
    is_row_cut = False
    if HAS_CUTS:
        top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
        is_row_cut = is_cut(temperature, top_k, top_p, min_p, vocab_size)
    if is_row_cut:
        scores = cleaned(raw, 1.0 / temperature)
        value = tl.max(scores, axis=0)
        token_id = part * COLUMNS
        reference = tl.where(value == float("-inf"), 0.0, value)
        tl.store(parts + 3 * PARTS, tl.sum(tl.exp2((scores - reference) * LOG2_E), axis=0))
        groups = scratch + row * ROW_WORDS + 4 * PARTS + part * (COLUMNS // GROUP)
        tl.store(groups + tl.arange(0, COLUMNS // GROUP), group_maxima(scores, COLUMNS))
    elif temperature > 0.0:
        scores = cleaned(raw, 1.0 / temperature)
        best = tl.max(scores, axis=0)
        reference = tl.where(best == float("-inf"), 0.0, best)
        noise = exponentials(noise_key(tl.load(seeds + row), tl.load(positions + row)), token_ids)
        race = noise * tl.exp2((reference - scores) * LOG2_E)
        least = tl.min(race, axis=0)
        token_id = tl.min(tl.where(race == least, token_ids, vocab_size - 1), axis=0)
        value = tl.where(best == float("-inf"), best, best - tl.log(least))
    else:
        # What is no number loses against everything, so that there always is a token.
        scores = tl.where(raw == raw, raw, float("-inf"))
        value = tl.max(scores, axis=0)
        token_id = tl.min(tl.where(scores == value, token_ids, vocab_size - 1), axis=0)
    tl.store(parts, value)
    tl.store(parts + PARTS, token_id.to(tl.float32, bitcast=True))
    tl.store(parts + 2 * PARTS, tl.min(is_finite.to(tl.float32), axis=0))


@triton.jit
def _best_part(parts, num_parts, vocab_size, PARTS: tl.constexpr):
    """The token of the best part, the first one's of equal values, and whether a logit was not finite."""
    places = tl.arange(0, PARTS)
    inside = places < num_parts
    values = tl.load(parts + places, mask=inside, other=float("-inf"))
    best = tl.max(values, axis=0)
    part = tl.min(tl.where(inside & (values == best), places, num_parts - 1), axis=0)
    all_finite = tl.min(tl.load(parts + 2 * PARTS + places, mask=inside, other=1.0), axis=0)
    token_id = tl.load(parts + PARTS + part).to(tl.int32, bitcast=True)
    return tl.minimum(token_id, vocab_size - 1), all_finite == 0.0


@KernelLauncher
@triton.jit(do_not_specialize=["num_parts", "vocab_size"])
def _best_of_parts(
    scratch, token_ids, is_invalid, num_parts, vocab_size, PARTS: tl.constexpr, ROW_WORDS: tl.constexpr
):  # fmt: skip
    """One program for each row."""
    row = tl.program_id(0).to(tl.int64)
    token_id, row_is_invalid = _best_part(scratch + row * ROW_WORDS, num_parts, vocab_size, PARTS)
    tl.store(token_ids + row, token_id.to(tl.int64))
    tl.store(is_invalid + row, row_is_invalid)


@triton.jit
def _race_of_row(row_logits, vocab_size, inverse_temperature, highest, floor, key, COLUMNS: tl.constexpr):
    """The winner among all tokens of a row that reach the floor."""
    least = tl.full((COLUMNS,), float("inf"), dtype=tl.float32)
    winners = tl.zeros((COLUMNS,), dtype=tl.int32)
    for first in tl.range(0, vocab_size, COLUMNS, num_stages=3):
        token_ids = first + tl.arange(0, COLUMNS)
        raw = tl.load(row_logits + token_ids, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
        scores = cleaned(raw, inverse_temperature)
        race = exponentials(key, token_ids) * tl.exp2((highest - scores) * LOG2_E)
        wins = (scores >= floor) & (race < least)
        least = tl.where(wins, race, least)
        winners = tl.where(wins, token_ids, winners)
    return tl.min(tl.where(least == tl.min(least, axis=0), winners, vocab_size - 1), axis=0)


@triton.jit
def _floor_of_candidates(scores, top_k, top_p, floor, highest, total, vocab_size, has_all):
    """The floor among the candidates' scores; ``total`` is the whole row's likelihood, that of the highest is 1.

    ``floor`` is that of min_p; ``has_all``: nothing but candidates counts for top_p.
    """
    weights = tl.exp2((scores - highest) * LOG2_E)
    low = tl.min(tl.where(scores == float("-inf"), float("inf"), scores), axis=0)
    if (top_k > 0) & (top_k < vocab_size):
        ones = tl.where(scores == float("-inf"), 0.0, 1.0)
        floor = tl.maximum(floor, floor_among(scores, ones, tl.cast(top_k, tl.float32), low, above(highest)))
    if top_p < 1.0:
        if has_all:
            total = tl.sum(tl.where(scores >= floor, weights, 0.0), axis=0)
        wanted = tl.maximum(top_p * total, 1e-30)
        floor = floor_among(scores, weights, wanted, tl.maximum(floor, low), above(highest))
    return floor


@triton.jit
def _draw_cut_row(
    row_logits, row_scratch, temperature, top_k, top_p, min_p, key, vocab_size, num_parts,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, PASS_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A token of a row that has a finite logit, and the floor, below which nothing was drawn."""
    inverse_temperature = 1.0 / temperature
    places = tl.arange(0, PARTS)
    values = tl.load(row_scratch + places, mask=places < num_parts, other=float("-inf"))
    sums = tl.load(row_scratch + 3 * PARTS + places, mask=places < num_parts, other=0.0)
    highest = tl.max(values, axis=0)
    total = tl.sum(sums * tl.exp2((values - highest) * LOG2_E), axis=0)
    groups = tl.arange(0, GROUPS)
    is_group = groups < num_parts * (COLUMNS // GROUP)
    maxima = tl.load(row_scratch + 4 * PARTS + groups, mask=is_group, other=float("-inf"))

    has_top_k = (top_k > 0) & (top_k < vocab_size)
    floor = float("-inf")
    if min_p > 0.0:
        floor = highest + tl.log(min_p)
    threshold = floor
    if has_top_k | (min_p <= 0.0):
        weights = tl.where(has_top_k, 1.0, tl.exp2((maxima - highest) * LOG2_E))
        # A little more than top_p needs: sums are rounded.
        wanted = tl.where(has_top_k, tl.cast(top_k, tl.float32), top_p * total * 1.0001)
        threshold = tl.maximum(threshold, group_threshold(maxima, weights, wanted))

    group_ids = row_scratch + 4 * PARTS + GROUPS
    found_scores = group_ids + CANDIDATE_GROUPS_MAX
    found_token_ids = found_scores + CANDIDATES_MAX
    num_groups = gather_groups(maxima, threshold, group_ids, GROUPS)
    num_found = CANDIDATES_MAX + 1
    if num_groups <= CANDIDATE_GROUPS_MAX:
        num_found = gather_candidates(
            row_logits, vocab_size, inverse_temperature, threshold, group_ids, num_groups, found_scores, found_token_ids
        )
    if num_found <= CANDIDATES_MAX:
        at = tl.arange(0, CANDIDATES_MAX)
        scores = tl.load(found_scores + at, mask=at < num_found, other=float("-inf"))
        token_ids = tl.load(found_token_ids + at, mask=at < num_found, other=0.0).to(tl.int32, bitcast=True)
        has_all = has_top_k | (min_p > 0.0)
        floor = _floor_of_candidates(scores, top_k, top_p, floor, highest, total, vocab_size, has_all)
        race = exponentials(key, token_ids) * tl.exp2((highest - scores) * LOG2_E)
        race = tl.where((scores >= floor) & (at < num_found), race, float("inf"))
        token_id = tl.min(tl.where(race == tl.min(race, axis=0), token_ids, vocab_size - 1), axis=0)
    else:
        floor = floor_of_row(
            row_logits, vocab_size, inverse_temperature, highest, floor, top_k, top_p, total, found_scores, PASS_COLUMNS
        )
        token_id = _race_of_row(row_logits, vocab_size, inverse_temperature, highest, floor, key, PASS_COLUMNS)
    return token_id, floor


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_parts"],
    do_not_specialize_on_alignment=["temperatures", "seeds", "positions", "top_ks", "top_ps", "min_ps"],
)
def _draw_rows(
    logits, temperatures, seeds, positions, top_ks, top_ps, min_ps, scratch, token_ids, is_invalid,
    row_stride, vocab_size, num_parts,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, ROW_WORDS: tl.constexpr, COLUMNS: tl.constexpr,
    PASS_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each row, whether it is cut or not."""
    row = tl.program_id(0).to(tl.int64)
    row_scratch = scratch + row * ROW_WORDS
    temperature = tl.load(temperatures + row)
    top_k, top_p, min_p = tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)
    token_id, row_is_invalid = _best_part(row_scratch, num_parts, vocab_size, PARTS)
    floor = float("-inf")
    places = tl.arange(0, PARTS)
    values = tl.load(row_scratch + places, mask=places < num_parts, other=float("-inf"))
    is_row_cut = is_cut(temperature, top_k, top_p, min_p, vocab_size)
    if is_row_cut & (tl.max(values, axis=0) > float("-inf")):
        token_id, floor = _draw_cut_row(
            logits + row * row_stride, row_scratch, temperature, top_k, top_p, min_p,
            noise_key(tl.load(seeds + row), tl.load(positions + row)), vocab_size, num_parts,
            PARTS, GROUPS, COLUMNS, PASS_COLUMNS,
        )  # fmt: skip
    tl.store(token_ids + row, token_id.to(tl.int64))
    tl.store(is_invalid + row, row_is_invalid)
    tl.store(row_scratch + ROW_WORDS - 1, floor)


def draw_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [num_rows] int64 of logits [num_rows, vocab_size], and [num_rows] bool: a logit was not finite.

    All others are [num_rows]: ``temperature`` float32, 0 for greedy; ``seeds`` and ``positions`` in the output
    int64; ``top_k`` int64, 0 or the vocabulary's size for all; ``top_p`` float32, 1 for all; ``min_p`` float32, 0
    for none; None where nobody wants it, and cheapest where all three are None or none is. The logits are not
    changed, and no result waits for the device. A row whose logits are all -inf gets a token, too.
    """
    if top_k is None and top_p is None and min_p is None:
        return _draw_uncut(logits, temperature, seeds, positions)
    top_k = torch.zeros_like(positions) if top_k is None else top_k
    top_p = torch.ones_like(temperature) if top_p is None else top_p
    min_p = torch.zeros_like(temperature) if min_p is None else min_p
    return draw_with_floors(logits, temperature, seeds, positions, top_k, top_p, min_p)[:2]


def _draw_uncut(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    is_invalid = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if num_rows == 0:
        return token_ids, is_invalid
    num_parts = triton.cdiv(vocab_size, _COLUMNS)
    all_parts = triton.next_power_of_2(num_parts)
    row_words = 3 * all_parts
    scratch = torch.empty((num_rows, row_words), dtype=torch.float32, device=logits.device)
    nothing = (temperature, temperature, temperature)
    _draw_parts(
        (num_rows, num_parts, 1),
        (logits, temperature, seeds, positions, *nothing, scratch, logits.stride(0), vocab_size),
        (False, all_parts, row_words, _COLUMNS),
        num_warps=8,
    )
    _best_of_parts(
        (num_rows, 1, 1), (scratch, token_ids, is_invalid, num_parts, vocab_size), (all_parts, row_words), num_warps=1
    )
    return token_ids, is_invalid


def draw_with_floors(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `draw_tokens`, and [num_rows] float32: the logit * (1 / temperature) below which nothing is drawn."""
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    is_invalid = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    num_parts = triton.cdiv(vocab_size, _COLUMNS)
    all_parts = triton.next_power_of_2(num_parts)
    all_groups = all_parts * (_COLUMNS // GROUP.value)
    row_words = 4 * all_parts + all_groups + CANDIDATE_GROUPS_MAX.value + 2 * CANDIDATES_MAX.value + 4
    scratch = torch.empty((num_rows, row_words), dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return token_ids, is_invalid, scratch[:, 0]
    rows = (logits, temperature, seeds, positions, top_k, top_p, min_p, scratch)
    _draw_parts(
        (num_rows, num_parts, 1),
        (*rows, logits.stride(0), vocab_size),
        (True, all_parts, row_words, _COLUMNS),
        num_warps=8,
    )
    _draw_rows(
        (num_rows, 1, 1),
        (*rows, token_ids, is_invalid, logits.stride(0), vocab_size, num_parts),
        (all_parts, all_groups, row_words, _COLUMNS, _PASS_COLUMNS),
        num_warps=8,
        registers_max=_REGISTERS_MAX,
    )
    return token_ids, is_invalid, scratch[:, -1]
