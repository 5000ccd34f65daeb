"""Of a row of logits the few tokens that matter, gathered without looking at the whole row again.

A first pass keeps the largest score of each group of GROUP tokens that lie together. No token of a group exceeds it,
so whatever asks for tokens above some score reads those groups alone; and as each group has a token that reaches
its maximum, the maxima say how many, or how likely, the tokens above a score are at least.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import triton
import triton.language as tl

GROUP = tl.constexpr(32)
CANDIDATE_GROUPS_MAX = tl.constexpr(2048)
CANDIDATES_MAX = tl.constexpr(4096)
LOG2_E = tl.constexpr(1.4426950408889634)
_HIGHEST_SCORE = tl.constexpr(3.0e38)
_GROUPS_AT_A_TIME = tl.constexpr(128)
_NUM_HALVINGS = tl.constexpr(18)


@triton.jit
def cleaned(raw, inverse_temperature):
    """Scores of raw logits: -inf for what is no number, and nothing that is infinitely large."""
    return tl.minimum(tl.where(raw == raw, raw, float("-inf")) * inverse_temperature, _HIGHEST_SCORE)


@triton.jit
def group_maxima(scores, COLUMNS: tl.constexpr):
    """[COLUMNS // GROUP], of scores [COLUMNS]."""
    return tl.max(tl.reshape(scores, [COLUMNS // GROUP, GROUP]), axis=1)


@triton.jit
def group_threshold(maxima, weights, wanted):
    """A score so that the groups that reach it weigh ``wanted`` or a little more; -inf where all weigh less."""
    highest = tl.max(maxima, axis=0)
    low = tl.maximum(tl.min(tl.where(maxima == float("-inf"), float("inf"), maxima), axis=0), highest - 1e4)
    high = highest
    is_enough = tl.sum(tl.where(maxima >= low, weights, 0.0), axis=0) >= wanted
    for _ in range(_NUM_HALVINGS):
        middle = low + (high - low) * 0.5
        reaches = tl.sum(tl.where(maxima >= middle, weights, 0.0), axis=0) >= wanted
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
    return tl.where(is_enough, low, float("-inf"))


@triton.jit
def gather_groups(maxima, threshold, group_ids, GROUPS: tl.constexpr):
    """Write the groups that reach the threshold to group_ids, their bits as floats, and count them all."""
    is_candidate = (maxima >= threshold) & (maxima > float("-inf"))
    ones = is_candidate.to(tl.int32)
    places = tl.cumsum(ones, axis=0) - 1
    ids = tl.arange(0, GROUPS).to(tl.float32, bitcast=True)
    tl.store(group_ids + places, ids, mask=is_candidate & (places < CANDIDATE_GROUPS_MAX))
    tl.debug_barrier()
    return tl.sum(ones, axis=0)


@triton.jit
def gather_candidates(
    row_logits, vocab_size, inverse_temperature, threshold, group_ids, num_groups, found_scores, found_token_ids
):  # fmt: skip
    """Write the scores of these groups that reach the threshold, and their tokens' bits as floats; count them all."""
    num_found = tl.zeros([], dtype=tl.int32)
    for first in range(0, num_groups, _GROUPS_AT_A_TIME):
        places = first + tl.arange(0, _GROUPS_AT_A_TIME)
        inside = places < num_groups
        groups = tl.load(group_ids + places, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        token_ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        there = inside[:, None] & (token_ids < vocab_size)
        raw = tl.load(row_logits + token_ids, mask=there, other=float("-inf")).to(tl.float32)
        scores = cleaned(raw, inverse_temperature)
        is_found = (scores >= threshold) & (scores > float("-inf"))
        ones = tl.reshape(is_found.to(tl.int32), [_GROUPS_AT_A_TIME * GROUP])
        ends = tl.reshape(num_found + tl.cumsum(ones, axis=0), [_GROUPS_AT_A_TIME, GROUP])
        has_room = is_found & (ends <= CANDIDATES_MAX)
        tl.store(found_scores + ends - 1, scores, mask=has_room)
        tl.store(found_token_ids + ends - 1, token_ids.to(tl.float32, bitcast=True), mask=has_room)
        num_found += tl.sum(ones, axis=0)
    tl.debug_barrier()
    return num_found
