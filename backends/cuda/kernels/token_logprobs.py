"""Log-probabilities of drawn tokens and of the most likely ones, without a sort and without writing a row's softmax.

One pass over the logits gives each part's share of the softmax, how many logits exceed the drawn token's, and the
largest of each group. Of all tokens the likeliest is that of the group with the largest of these; once it is taken
out of its group, the next one is found the same way.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.candidates import GROUP, LOG2_E, cleaned, group_maxima
from backends.cuda.kernels.kernel_launcher import KernelLauncher

_COLUMNS = 4096
_NO_TOKEN = tl.constexpr(2147483647)


@KernelLauncher
@triton.jit(do_not_specialize_on_alignment=["rows"])
def _weigh_parts(
    logits, rows, drawn_token_ids, scratch,
    row_stride, vocab_size,
    PARTS: tl.constexpr, ROW_WORDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each reported row and COLUMNS of its tokens."""
    number = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.load(rows + number)
    row_logits = logits + row * row_stride
    token_ids = part * COLUMNS + tl.arange(0, COLUMNS)
    raw = tl.load(row_logits + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
    drawn = cleaned(tl.load(row_logits + tl.load(drawn_token_ids + row)), 1.0)
    scores = cleaned(raw, 1.0)
    value = tl.max(scores, axis=0)
    reference = tl.where(value == float("-inf"), 0.0, value)
    parts = scratch + number * ROW_WORDS + part
    tl.store(parts, value)
    tl.store(parts + PARTS, tl.sum(tl.exp2((scores - reference) * LOG2_E), axis=0))
    tl.store(parts + 2 * PARTS, tl.sum(tl.where(scores > drawn, 1.0, 0.0), axis=0))
    groups = scratch + number * ROW_WORDS + 3 * PARTS + part * (COLUMNS // GROUP)
    tl.store(groups + tl.arange(0, COLUMNS // GROUP), group_maxima(scores, COLUMNS))


@triton.jit
def _group_scores(row_logits, group, vocab_size):
    """Token ids and scores of a group, [GROUP] each."""
    token_ids = group * GROUP + tl.arange(0, GROUP)
    raw = tl.load(row_logits + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
    return token_ids, cleaned(raw, 1.0)


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_parts", "num_top", "report_width"], do_not_specialize_on_alignment=["rows", "report"]
)
def _report_rows(
    logits, rows, drawn_token_ids, scratch, report,
    row_stride, vocab_size, num_parts, num_top, report_width,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, ROW_WORDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for each reported row."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number)
    row_logits = logits + row * row_stride
    row_scratch = scratch + number * ROW_WORDS
    row_report = report + number * report_width
    places = tl.arange(0, PARTS)
    inside = places < num_parts
    values = tl.load(row_scratch + places, mask=inside, other=float("-inf"))
    sums = tl.load(row_scratch + PARTS + places, mask=inside, other=0.0)
    nums_above = tl.load(row_scratch + 2 * PARTS + places, mask=inside, other=0.0)
    highest = tl.max(values, axis=0)
    log_total = highest + tl.log(tl.sum(sums * tl.exp2((values - highest) * LOG2_E), axis=0))
    drawn_token_id = tl.load(drawn_token_ids + row)
    drawn = cleaned(tl.load(row_logits + drawn_token_id), 1.0)
    tl.store(row_report, tl.sum(nums_above, axis=0).to(tl.int32) + 1)
    tl.store(row_report + 1, drawn_token_id.to(tl.int32))
    tl.store(row_report + 2, (drawn - log_total).to(tl.int32, bitcast=True))
    groups = tl.arange(0, GROUPS)
    is_group = groups < num_parts * (COLUMNS // GROUP)
    # Of the tokens that are not reported yet.
    maxima = tl.load(row_scratch + 3 * PARTS + groups, mask=is_group, other=float("-inf"))
    last_score, last_token_id = float("inf"), 0
    for place in range(num_top):
        score = tl.max(maxima, axis=0)
        group = tl.min(tl.where(is_group & (maxima == score), groups, GROUPS), axis=0)
        token_ids, scores = _group_scores(row_logits, group, vocab_size)
        is_left = (scores < last_score) | ((scores == last_score) & (token_ids > last_token_id))
        token_id = tl.min(tl.where(is_left & (scores == score), token_ids, vocab_size - 1), axis=0)
        last_score, last_token_id = score, token_id
        is_left = (scores < score) | ((scores == score) & (token_ids > token_id))
        left = tl.max(tl.where(is_left, scores, float("-inf")), axis=0)
        maxima = tl.where(groups == group, left, maxima)
        tl.store(row_report + 3 + 2 * place, token_id)
        tl.store(row_report + 4 + 2 * place, (score - log_total).to(tl.int32, bitcast=True))


def report_logprobs(
    logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, num_top: int, report: torch.Tensor
) -> None:
    """Write to report [num_reported, 3 + 2 * num_top] int32 what is to be told of these rows.

    That is the drawn token's rank from 1, then token ids and the bits of their log-probabilities in float32 in turn:
    the drawn token's, and those of the ``num_top`` most likely ones, at most as many as there are. ``logits``
    [num_rows, vocab_size] float32 are as the model gave them, ``rows`` [num_reported] int64, and ``token_ids``
    [num_rows] int64 are drawn for all rows.
    """
    num_reported, vocab_size = rows.numel(), logits.shape[1]
    num_parts = triton.cdiv(vocab_size, _COLUMNS)
    all_parts = triton.next_power_of_2(num_parts)
    all_groups = all_parts * (_COLUMNS // GROUP.value)
    row_words = 3 * all_parts + all_groups
    scratch = torch.empty((num_reported, row_words), dtype=torch.float32, device=logits.device)
    where = (logits, rows, token_ids, scratch)
    strides = (logits.stride(0), vocab_size)
    _weigh_parts((num_reported, num_parts, 1), (*where, *strides), (all_parts, row_words, _COLUMNS), num_warps=8)
    _report_rows(
        (num_reported, 1, 1),
        (*where, report, *strides, num_parts, num_top, report.shape[1]),
        (all_parts, all_groups, row_words, _COLUMNS),
        num_warps=8,
    )
