"""Attention of prompts by torch's flash attention, on a contiguous copy of what the paged cache holds of them.

The copy costs a thousandth of the products of a long prompt, and the kernel that torch brings reads contiguous
keys faster than any that looks up pages (Dao 2023, arXiv:2307.08691).
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.tile_shapes import power_of_two_from

_TOKENS = 16  # of one program
_SEQUENCES = 64  # whose lengths are summed at once


@triton.jit(
    do_not_specialize=["num_seqs", "table_row_stride"],
    do_not_specialize_on_alignment=["context_lens", "block_tables"],
)
def _gather_contexts(
    key_cache, value_cache, keys, values, key_starts, context_lens, block_tables,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    table_row_stride, num_seqs,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """One program for TOKENS tokens of each sequence; the sequences lie one after the other."""
    sequence = tl.program_id(1)
    context_len = tl.load(context_lens + sequence)
    first_token = tl.program_id(0) * TOKENS
    if first_token >= context_len:
        return
    start = 0
    for first in range(0, sequence, SEQUENCES):
        before = first + tl.arange(0, SEQUENCES)
        start += tl.sum(tl.load(context_lens + before, mask=before < sequence, other=0), axis=0)
    if first_token == 0:
        tl.store(key_starts + sequence, start)
        if sequence == num_seqs - 1:
            tl.store(key_starts + num_seqs, start + context_len)
    tokens, columns = first_token + tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    is_token = tokens < context_len
    inside = is_token[:, None] & (columns < WIDTH)[None, :]
    table = block_tables + sequence.to(tl.int64) * table_row_stride
    blocks = tl.load(table + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
    slots, heads, head_columns = tokens % BLOCK_SIZE, columns // HEAD_DIM, columns % HEAD_DIM
    key_places = blocks * key_block_stride + slots * key_slot_stride
    value_places = blocks * value_block_stride + slots * value_slot_stride
    key_columns, value_columns = heads * key_head_stride + head_columns, heads * value_head_stride + head_columns
    loaded_keys = tl.load(key_cache + key_places[:, None] + key_columns[None, :], mask=inside)
    loaded_values = tl.load(value_cache + value_places[:, None] + value_columns[None, :], mask=inside)
    places = (start + tokens).to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(keys + places, loaded_keys.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + places, loaded_values.to(values.dtype.element_ty), mask=inside)


def gather_contexts(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    context_len_max: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [num_seqs * context_len_max, num_kv_heads, head_dim] of all sequences, one after the other.

    And where each starts, [num_seqs + 1] int32; what is behind the last one is not set. The lengths are read on
    the device, so there is room for the case that all are the longest.
    """
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    num_seqs, device = context_lens.shape[0], key_cache.device
    keys = torch.empty((num_seqs * context_len_max, num_kv_heads, head_dim), dtype=dtype, device=device)
    values = torch.empty_like(keys)
    key_starts = torch.empty(num_seqs + 1, dtype=torch.int32, device=device)
    _gather_contexts[triton.cdiv(context_len_max, _TOKENS), num_seqs](
        key_cache,
        value_cache,
        keys,
        values,
        key_starts,
        context_lens,
        block_tables,
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        block_tables.stride(0),
        num_seqs,
        WIDTH=num_kv_heads * head_dim,
        HEAD_DIM=head_dim,
        COLUMNS=power_of_two_from(num_kv_heads * head_dim),
        BLOCK_SIZE=block_size,
        TOKENS=_TOKENS,
        SEQUENCES=_SEQUENCES,
    )
    return keys, values, key_starts


def gathered_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    query_len_max: int,
    context_len_max: int,
    *,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """[num_tokens, num_heads * head_dim], of which the rows that ``query_starts`` names are set.

    The other arguments are those of ``prefill_attention``, with bounds of the sequences' lengths.
    """
    keys, values, key_starts = gather_contexts(
        key_cache, value_cache, context_lens, block_tables, context_len_max, query.dtype
    )
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        torch.unflatten(query, 1, (-1, key_cache.shape[3])),
        keys,
        values,
        query_starts,
        key_starts,
        query_len_max,
        context_len_max,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=sliding_window - 1 if sliding_window else None,
        window_size_right=0 if sliding_window else None,
    )[0]
    return out.flatten(1)
