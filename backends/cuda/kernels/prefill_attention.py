"""Paged attention of sequences with any number of rows: prompts, chunks of prompts, and decodes too.

The query heads that share a key-value head are packed into one tile of rows, so that keys are read once for
all of them. A sequence of n rows has at most n // tokens_per_tile + 1 tiles; giving each sequence that many
places in the grid lets a program find its sequence by bisection of ``query_starts``, on the device.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.attention_tile import attend_range
from backends.cuda.kernels.kernel_launcher import KernelLauncher
from backends.cuda.kernels.tile_shapes import LOG2_E, TileShape, head_columns


@triton.jit
def _sequence_of_tile(tile, query_starts, num_seqs, TOKENS: tl.constexpr):
    """The last sequence whose places in the grid begin at or before the tile."""
    base = tl.load(query_starts)
    low, high = 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        first_tile = (tl.load(query_starts + middle) - base) // TOKENS + middle
        low = tl.where(first_tile <= tile, middle, low)
        high = tl.where(first_tile <= tile, high, middle)
    return low


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_seqs", "table_row_stride"],
    do_not_specialize_on_alignment=["query_starts", "context_lens", "block_tables"],
)
def _prefill_attention(
    query, key_cache, value_cache, out, query_starts, context_lens, block_tables, num_seqs,
    query_row_stride, out_row_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    table_row_stride, scale,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program for each tile of TOKENS tokens x GROUP heads and each key-value head."""
    # The last tiles of a prompt see the most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = _sequence_of_tile(tile, query_starts, num_seqs, TOKENS)
    first_row = tl.load(query_starts + sequence)
    num_rows = tl.load(query_starts + sequence + 1) - first_row
    tile_of_sequence = tile - ((first_row - tl.load(query_starts)) // TOKENS + sequence)
    first_token = tile_of_sequence * TOKENS
    if first_token >= num_rows:
        return
    context_len = tl.load(context_lens + sequence)
    first_position = context_len - num_rows + first_token

    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tokens = first_token + rows // GROUP
    inside = ((tokens < num_rows) & (rows < TOKENS * GROUP))[:, None] & (columns < HEAD_DIM)[None, :]
    token_rows = (first_row + tokens).to(tl.int64)
    head_columns = (kv_head * GROUP + rows % GROUP) * HEAD_DIM
    places = token_rows * query_row_stride + head_columns
    tile_query = tl.load(query + places[:, None] + columns[None, :], mask=inside, other=0.0)

    first_seen_key, first_key = 0, 0
    if WINDOW > 0:
        first_seen_key = tl.maximum(first_position - WINDOW + 1, 0)
        first_key = first_seen_key // KEYS * KEYS
    result, weight_sum, _ = attend_range(
        tile_query,
        context_len - num_rows + tokens,
        key_cache + kv_head * key_head_stride,
        value_cache + kv_head * value_head_stride,
        block_tables + sequence.to(tl.int64) * table_row_stride,
        first_key,
        tl.minimum(first_position + TOKENS, context_len),
        first_seen_key,
        (first_position + 1) // KEYS * KEYS,
        key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
        scale, ROWS, BLOCK_SIZE, HEAD_DIM, COLUMNS, KEYS, WINDOW, WINDOW == 0,
    )  # fmt: skip
    result = result / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    places = token_rows * out_row_stride + head_columns
    tl.store(out + places[:, None] + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_rows: int,
    shape: TileShape,
    *,
    scale: float,
    sliding_window: int,
) -> None:
    """Attention of ``num_rows`` rows of ``query`` [num_tokens, num_heads * head_dim] into the same rows of ``out``.

    ``query_starts`` [num_seqs + 1] names rows of ``query``; ``context_lens`` is [num_seqs] and
    ``block_tables`` [num_seqs, num_blocks_max], all int32. Nothing is read back from the device.
    """
    num_seqs = context_lens.shape[0]
    if num_rows == 0 or num_seqs == 0:
        return
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    group = query.shape[1] // head_dim // num_kv_heads
    tokens = shape.num_rows // group
    tensors = (query, key_cache, value_cache, out, query_starts, context_lens, block_tables)
    strides = (query.stride(0), out.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3])
    _prefill_attention(
        (num_rows // tokens + num_seqs, num_kv_heads, 1),
        (*tensors, num_seqs, *strides, block_tables.stride(0), scale * LOG2_E),
        (
            group,
            tokens,
            shape.num_rows,
            shape.num_keys,
            block_size,
            head_dim,
            head_columns(head_dim),
            sliding_window,
        ),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
