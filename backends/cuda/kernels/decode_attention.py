"""Paged attention of sequences with one row each, the keys of each split into parts.

With few sequences a device would stand idle if each were one program, so several programs share a
sequence's keys, and a second kernel joins their parts (Dao et al. 2023, Flash-Decoding). The query heads
that share a key-value head are the rows of one tile.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.attention_tile import attend_range
from backends.cuda.kernels.kernel_launcher import KernelLauncher
from backends.cuda.kernels.tile_shapes import LOG2_E, PARTS_MAX, TileShape, head_columns


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_parts", "table_row_stride"],
    do_not_specialize_on_alignment=["context_lens", "block_tables"],
)
def _decode_attention(
    query, key_cache, value_cache, out, part_results, part_scores, context_lens, block_tables,
    query_row_stride, out_row_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    table_row_stride, num_parts, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, IS_SPLIT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program for each sequence, key-value head and part. Unless it is split the result is final."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    context_len = tl.load(context_lens + sequence)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    heads = kv_head * GROUP + rows
    places = sequence * query_row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
    tile_query = tl.load(query + places, mask=inside, other=0.0)

    first_seen_key, first_key = 0, 0
    if WINDOW > 0:
        first_seen_key = tl.maximum(context_len - WINDOW, 0)
        first_key = first_seen_key // KEYS * KEYS
    num_tiles = tl.cdiv(context_len - first_key, KEYS)
    part_keys = tl.cdiv(num_tiles, num_parts) * KEYS
    first_key += part * part_keys
    end_key = tl.minimum(first_key + part_keys, context_len)
    result, weight_sum, score_max = attend_range(
        tile_query,
        tl.zeros((ROWS,), dtype=tl.int32) + (context_len - 1),
        key_cache + kv_head.to(tl.int64) * key_head_stride,
        value_cache + kv_head.to(tl.int64) * value_head_stride,
        block_tables + sequence * table_row_stride,
        first_key,
        end_key,
        first_seen_key,
        end_key // KEYS * KEYS,
        key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
        scale, ROWS, BLOCK_SIZE, HEAD_DIM, COLUMNS, KEYS, WINDOW,
        # A short part would wait twice for its first keys, before tiles without masks and before the last one.
        WINDOW == 0 and not IS_SPLIT,
    )  # fmt: skip
    result = result / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    if IS_SPLIT:
        num_heads = tl.num_programs(1) * GROUP
        places = (sequence * num_heads + heads) * num_parts + part
        tl.store(part_results + places[:, None] * HEAD_DIM + columns[None, :], result, mask=inside)
        tl.store(part_scores + places, score_max + tl.log2(weight_sum), mask=rows < GROUP)
    else:
        places = sequence * out_row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
        tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)


@KernelLauncher
@triton.jit(do_not_specialize=["num_parts"])
def _join_parts(
    part_results,
    part_scores,
    out,
    out_row_stride,
    num_parts,
    PARTS_MAX: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for each sequence and head: parts weighed by the sum of their exponentials, 2 ** score."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first_place = (sequence * tl.num_programs(1) + head) * num_parts
    every = tl.arange(0, PARTS_MAX)
    scores = tl.load(part_scores + first_place + every, mask=every < num_parts, other=float("-inf"))
    score_max = tl.max(scores, axis=0)
    score_max = tl.where(score_max == float("-inf"), 0.0, score_max)
    weight_sum = tl.sum(tl.exp2(scores - score_max), axis=0)
    columns = tl.arange(0, COLUMNS)
    joined = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, num_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        is_part = parts < num_parts
        places = first_place + parts
        weights = tl.exp2(tl.load(part_scores + places, mask=is_part, other=float("-inf")) - score_max)
        inside = is_part[:, None] & (columns < HEAD_DIM)[None, :]
        results = tl.load(part_results + places[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        joined += tl.sum(results * weights[:, None], axis=0)
    joined = joined / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    place = sequence * out_row_stride + head * HEAD_DIM + columns
    tl.store(out + place, joined.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_parts: int,
    shape: TileShape,
    *,
    scale: float,
    sliding_window: int,
) -> None:
    """Attention of the first rows of ``query``, one for each of ``context_lens``, into those of ``out``.

    Each sequence's own keys are cut into ``num_parts`` parts, at most PARTS_MAX, on the device: a captured launch
    stays right for any context.
    """
    num_seqs = context_lens.shape[0]
    if num_seqs == 0:
        return
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    num_heads = query.shape[1] // head_dim
    group = num_heads // num_kv_heads
    part_results, part_scores = out, out
    if num_parts > 1:
        part_shape = (num_seqs, num_heads, num_parts)
        part_results = torch.empty((*part_shape, head_dim), dtype=torch.float32, device=query.device)
        part_scores = torch.empty(part_shape, dtype=torch.float32, device=query.device)
    tensors = (query, key_cache, value_cache, out, part_results, part_scores, context_lens, block_tables)
    strides = (query.stride(0), out.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3])
    _decode_attention(
        (num_seqs, num_kv_heads, num_parts),
        (*tensors, *strides, block_tables.stride(0), num_parts, scale * LOG2_E),
        (
            group,
            shape.num_rows,
            shape.num_keys,
            num_parts > 1,
            block_size,
            head_dim,
            head_columns(head_dim),
            sliding_window,
        ),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if num_parts > 1:
        _join_parts(
            (num_seqs, num_heads, 1),
            (part_results, part_scores, out, out.stride(0), num_parts),
            (PARTS_MAX, 16, head_dim, head_columns(head_dim)),
        )
