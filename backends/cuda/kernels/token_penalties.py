"""Penalties for tokens that were there before, in place: what ``sampler.penalties`` does, in one launch."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.kernel_launcher import KernelLauncher

_TOKENS = 1024


@triton.jit
def _penalised(value, repetition):
    return tl.where(value > 0.0, value / repetition, value * repetition)


@KernelLauncher
@triton.jit(do_not_specialize=["num_rows", "before_stride"], do_not_specialize_on_alignment=["places", "penalties"])
def _penalise(
    logits, places, penalties, token_table, before,
    num_rows, row_stride, table_stride, before_stride, vocab_size,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One program for each penalised row, with four passes over its tokens.

    A token that occurs more than once is penalised by many at a time: all write the same, worked out from what the
    logit was ``before``, and what the output adds is written after what the prompt says.
    """
    number = tl.program_id(0)
    row_logits = logits + tl.load(places + number) * row_stride
    row_tokens = token_table + tl.load(places + num_rows + number) * table_stride
    num_tokens = tl.load(places + 2 * num_rows + number).to(tl.int32)
    num_prompt_tokens = tl.load(places + 3 * num_rows + number).to(tl.int32)
    repetition = tl.load(penalties + number)
    presence = tl.load(penalties + num_rows + number)
    frequency = tl.load(penalties + 2 * num_rows + number)
    row_before = before + number.to(tl.int64) * before_stride
    steps = tl.arange(0, TOKENS)
    begin = 0
    if repetition == 1.0:
        begin = num_prompt_tokens
    for first in range(begin, num_tokens, TOKENS):
        positions = first + steps
        inside = positions < num_tokens
        token_ids = tl.load(row_tokens + positions, mask=inside, other=0)
        values = tl.load(row_logits + token_ids, mask=inside & (token_ids < vocab_size), other=0.0)
        tl.store(row_before + positions, values, mask=inside)
    tl.debug_barrier()
    if repetition != 1.0:
        for first in range(0, num_tokens, TOKENS):
            positions = first + steps
            inside = positions < num_tokens
            token_ids = tl.load(row_tokens + positions, mask=inside, other=0)
            values = tl.load(row_before + positions, mask=inside, other=0.0)
            tl.store(row_logits + token_ids, _penalised(values, repetition), mask=inside & (token_ids < vocab_size))
        tl.debug_barrier()
    if presence != 0.0:
        for first in range(num_prompt_tokens, num_tokens, TOKENS):
            positions = first + steps
            inside = positions < num_tokens
            token_ids = tl.load(row_tokens + positions, mask=inside, other=0)
            values = tl.load(row_before + positions, mask=inside, other=0.0)
            values = _penalised(values, repetition) - presence
            tl.store(row_logits + token_ids, values, mask=inside & (token_ids < vocab_size))
        tl.debug_barrier()
    if frequency != 0.0:
        for first in range(num_prompt_tokens, num_tokens, TOKENS):
            positions = first + steps
            inside = positions < num_tokens
            token_ids = tl.load(row_tokens + positions, mask=inside, other=0)
            tl.atomic_add(row_logits + token_ids, tl.zeros([TOKENS], tl.float32) - frequency,
                          mask=inside & (token_ids < vocab_size), sem="relaxed")  # fmt: skip


def penalise(
    logits: torch.Tensor,
    places: torch.Tensor,
    penalties: torch.Tensor,
    token_table: torch.Tensor,
    num_tokens_max: int,
) -> None:
    """Penalise logits [num_logit_rows, vocab_size] float32 in place.

    ``places`` [4, num_rows] int64 are rows of the logits, their rows of ``token_table`` [num_table_rows,
    num_columns] int32, how many tokens there are, at most ``num_tokens_max``, and how many of them are the prompt's;
    ``penalties`` [3, num_rows] float32 are repetition, presence and frequency.
    """
    num_rows = places.shape[1]
    before = torch.empty((num_rows, num_tokens_max), dtype=torch.float32, device=logits.device)
    _penalise(
        (num_rows, 1, 1),
        (
            *(logits, places, penalties, token_table, before),
            *(num_rows, logits.stride(0), token_table.stride(0), num_tokens_max, logits.shape[1]),
        ),
        (_TOKENS,),
        num_warps=8,
    )
