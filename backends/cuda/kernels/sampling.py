"""Draws a token for each row of logits: greedy, or from the softmax that temperature, min_p, top_k and top_p leave.

The draw is that of ``backends.model_runner.sampler``: the same hash of seed, output position and token id, so
that the same requests get the same tokens, but for ties that rounding decides. It is an exponential race: with
independent exponential E, the token of the least E / exp(score) is a draw from the softmax (Maddison et al. 2014,
A* sampling). The winner of a part of a row costs one logarithm for each token, and nothing is sorted.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.cutoff_floors import cutoff_floors

_COLUMNS = 4096
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _mixed(state):
    """The finaliser of SplitMix64."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def _exponentials(first_key, second_key, token_ids):
    """Standard exponential variables of tokens: see ``sampler.gumbel_noise``."""
    bits = token_ids.to(tl.uint32) * 0x9E3779B1 + first_key
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = bits ^ second_key
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    uniform = (tl.abs(bits.to(tl.int32, bitcast=True).to(tl.float32)) + 0.5) * 4.656612873077393e-10  # 2 ** -31
    uniform = tl.minimum(uniform, 0.99999994)  # 1 - 2 ** -24
    # The first terms of -log(1 - u), where 1 - u would lose the digits of a small u: the winners are small.
    near_zero = uniform * (1.0 + uniform * (0.5 + uniform * (0.33333334 + uniform * 0.25)))
    return tl.where(uniform < 0.015625, near_zero, -tl.log(1.0 - uniform))


@triton.jit(do_not_specialize_on_alignment=["temperatures", "seeds", "positions"])
def _draw_parts(
    logits, temperatures, seeds, positions, floors, part_values, part_token_ids, part_is_finite,
    row_stride, vocab_size,
    HAS_FLOORS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each row and COLUMNS of its tokens: the best value there, its token, whether all are finite."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token_ids = part * COLUMNS + tl.arange(0, COLUMNS)
    inside = token_ids < vocab_size
    raw = tl.load(logits + row * row_stride + token_ids, mask=inside, other=0.0).to(tl.float32)
    is_finite = tl.abs(raw) < float("inf")
    # What is no number loses against everything, so that there always is a token.
    scores = tl.where(inside & (raw == raw), raw, float("-inf"))
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        scores = scores * (1.0 / temperature)
        if HAS_FLOORS:
            scores = tl.where(scores < tl.load(floors + row), float("-inf"), scores)
        best = tl.max(scores, axis=0)
        reference = tl.where(best == float("-inf"), 0.0, best)
        state = _mixed(tl.load(seeds + row).to(tl.uint64) + 0x9E3779B97F4A7C15)
        key = _mixed(state + (tl.load(positions + row).to(tl.uint64) + 1) * 0x9E3779B97F4A7C15)
        noise = _exponentials(key.to(tl.uint32), (key >> 32).to(tl.uint32), token_ids)
        race = noise * tl.exp2((reference - scores) * _LOG2_E)
        least = tl.min(race, axis=0)
        token_id = tl.min(tl.where(race == least, token_ids, vocab_size - 1), axis=0)
        value = tl.where(best == float("-inf"), best, best - tl.log(least))
    else:
        value = tl.max(scores, axis=0)
        token_id = tl.min(tl.where(scores == value, token_ids, vocab_size - 1), axis=0)
    place = row * tl.num_programs(1) + part
    tl.store(part_values + place, value)
    tl.store(part_token_ids + place, token_id)
    tl.store(part_is_finite + place, tl.min(is_finite.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["num_parts"])
def _best_of_parts(
    part_values,
    part_token_ids,
    part_is_finite,
    token_ids,
    is_invalid,
    num_parts,
    PARTS: tl.constexpr,
):
    """One program for each row; of equal values the first part's token."""
    row = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, PARTS)
    inside = parts < num_parts
    places = row * num_parts + parts
    values = tl.load(part_values + places, mask=inside, other=float("-inf"))
    best = tl.max(values, axis=0)
    part = tl.min(tl.where(inside & (values == best), parts, num_parts - 1), axis=0)
    all_finite = tl.min(tl.load(part_is_finite + places, mask=inside, other=1), axis=0)
    tl.store(token_ids + row, tl.load(part_token_ids + row * num_parts + part).to(tl.int64))
    tl.store(is_invalid + row, all_finite == 0)


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
    for none; None where nobody wants it. The logits are not changed, and no result waits for the device. A row
    whose logits are all -inf gets a token, too.
    """
    num_rows, vocab_size = logits.shape
    device = logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    is_invalid = torch.empty(num_rows, dtype=torch.bool, device=device)
    if num_rows == 0:
        return token_ids, is_invalid
    is_cut = top_k is not None or top_p is not None or min_p is not None
    floors = cutoff_floors(logits, temperature, top_k, top_p, min_p) if is_cut else temperature
    num_parts = triton.cdiv(vocab_size, _COLUMNS)
    part_values = torch.empty((num_rows, num_parts), dtype=torch.float32, device=device)
    part_token_ids = torch.empty((num_rows, num_parts), dtype=torch.int32, device=device)
    part_is_finite = torch.empty((num_rows, num_parts), dtype=torch.int32, device=device)
    parts = (part_values, part_token_ids, part_is_finite)
    _draw_parts[num_rows, num_parts](
        logits,
        temperature,
        seeds,
        positions,
        floors,
        *parts,
        logits.stride(0),
        vocab_size,
        HAS_FLOORS=is_cut,
        COLUMNS=_COLUMNS,
        num_warps=8,
    )
    _best_of_parts[(num_rows,)](
        *parts, token_ids, is_invalid, num_parts, PARTS=triton.next_power_of_2(num_parts), num_warps=1
    )
    return token_ids, is_invalid
