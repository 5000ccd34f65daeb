"""Paged attention of sequences with one row each, the keys of all cut into parts of one length.

With a part for each program the device is evenly busy, with few sequences and with some that are much longer than
others; a second kernel joins the parts of a sequence (Dao et al. 2023, Flash-Decoding). How long a part is follows
from the contexts, on the device, once for each step: a captured launch stays right for any batch. The query heads that
share a key-value head are the rows of one tile.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.attention_tile import attend_range
from backends.cuda.kernels.kernel_launcher import KernelLauncher
from backends.cuda.kernels.tile_shapes import LOG2_E, TileShape, head_columns, power_of_two_from

_PART_TOKENS_MULTIPLE = 64  # of the keys of any tile
_SHORT_PART_TOKENS = 512
_SEQUENCES_MANY = 32


@dataclass(frozen=True, slots=True)
class DecodeParts:
    """How the keys of a step's sequences are cut."""

    starts: torch.Tensor  # [num_seqs + 2] int32: each sequence's first part, the number of parts, keys of a part
    num_parts_max: int


@triton.jit
def _first_tile_key(context_len, MULTIPLE: tl.constexpr, WINDOW: tl.constexpr):
    """The first key of the first tile that is read."""
    if WINDOW > 0:
        return tl.maximum(context_len - WINDOW, 0) // MULTIPLE * MULTIPLE
    return context_len * 0


@KernelLauncher
@triton.jit(do_not_specialize=["num_seqs", "num_wanted"], do_not_specialize_on_alignment=["context_lens"])
def _cut_into_parts(
    context_lens, starts, num_seqs, num_wanted, MULTIPLE: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr
):
    """One program. Parts are as long as makes about ``num_wanted`` of them."""
    sequences = tl.arange(0, SEQUENCES)
    inside = sequences < num_seqs
    lens = tl.load(context_lens + sequences, mask=inside, other=0)
    lens = lens - _first_tile_key(lens, MULTIPLE, WINDOW)
    total = tl.sum(lens.to(tl.int64), axis=0)
    part_len = (tl.cdiv(tl.cdiv(total, num_wanted), MULTIPLE) * MULTIPLE).to(tl.int32)
    part_len = tl.maximum(part_len, MULTIPLE)
    counts = tl.cdiv(lens, part_len)
    ends = tl.cumsum(counts, axis=0)
    tl.store(starts + sequences, ends - counts, mask=inside)
    tl.store(starts + num_seqs, tl.sum(counts, axis=0))
    tl.store(starts + num_seqs + 1, part_len)


@triton.jit
def _sequence_of_part(part, starts, num_seqs):
    """The last sequence whose parts begin at or before this one, but for those without any behind it."""
    low, high = 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(starts + middle) <= part
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_seqs", "table_row_stride"],
    do_not_specialize_on_alignment=["context_lens", "block_tables"],
)
def _decode_attention(
    query, key_cache, value_cache, out, part_results, part_scores, context_lens, block_tables, starts,
    query_row_stride, out_row_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    table_row_stride, num_seqs, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MULTIPLE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr,
    SHORT_PART: tl.constexpr,
):  # fmt: skip
    """One program for each part and key-value head. The result of a sequence's only part is final."""
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    if part >= tl.load(starts + num_seqs):
        return
    sequence = _sequence_of_part(part, starts, num_seqs)
    first_part = tl.load(starts + sequence)
    is_only = tl.load(starts + sequence + 1) == first_part + 1
    part_len = tl.load(starts + num_seqs + 1)
    context_len = tl.load(context_lens + sequence)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    heads = kv_head * GROUP + rows
    row = sequence.to(tl.int64)
    places = row * query_row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
    tile_query = tl.load(query + places, mask=inside, other=0.0)

    first_seen_key = 0
    if WINDOW > 0:
        first_seen_key = tl.maximum(context_len - WINDOW, 0)
    first_key = _first_tile_key(context_len, MULTIPLE, WINDOW) + (part - first_part) * part_len
    end_key = tl.minimum(first_key + part_len, context_len)
    # A short part would wait twice for its first keys, before tiles without masks and before the last one.
    end_unmasked_key = tl.where(end_key - first_key > SHORT_PART, end_key // KEYS * KEYS, first_key)
    result, weight_sum, score_max = attend_range(
        tile_query,
        tl.zeros((ROWS,), dtype=tl.int32) + (context_len - 1),
        key_cache + kv_head.to(tl.int64) * key_head_stride,
        value_cache + kv_head.to(tl.int64) * value_head_stride,
        block_tables + row * table_row_stride,
        first_key,
        end_key,
        first_seen_key,
        end_unmasked_key,
        key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
        scale, ROWS, BLOCK_SIZE, HEAD_DIM, COLUMNS, KEYS, WINDOW, WINDOW == 0,
    )  # fmt: skip
    result = result / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    out_places = row * out_row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
    part_places = part.to(tl.int64) * (KV_HEADS * GROUP) + heads
    if is_only:
        tl.store(out + out_places, result.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(part_results + part_places[:, None] * HEAD_DIM + columns[None, :], result, mask=inside)
        tl.store(part_scores + part_places, score_max + tl.log2(weight_sum), mask=rows < GROUP)


@KernelLauncher
@triton.jit
def _join_parts(
    part_results,
    part_scores,
    out,
    starts,
    out_row_stride,
    num_heads,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_ROOM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for HEADS heads of a sequence: parts weighed by the sum of their exponentials, 2 ** score."""
    sequence = tl.program_id(0).to(tl.int64)
    first_part = tl.load(starts + sequence)
    end_part = tl.load(starts + sequence + 1)
    if end_part - first_part < 2:
        return
    own = tl.arange(0, HEADS_ROOM)
    heads = tl.program_id(1) * HEADS + own
    columns = tl.arange(0, COLUMNS)
    score_max = tl.full((HEADS_ROOM,), float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros((HEADS_ROOM,), dtype=tl.float32)
    joined = tl.zeros((HEADS_ROOM, COLUMNS), dtype=tl.float32)
    for first in range(first_part, end_part, PARTS):
        parts = first + tl.arange(0, PARTS)
        places = parts[:, None].to(tl.int64) * num_heads + heads[None, :]
        inside = (parts < end_part)[:, None] & (own < HEADS)[None, :]
        scores = tl.load(part_scores + places, mask=inside, other=float("-inf"))
        inside = inside[:, :, None] & (columns < HEAD_DIM)[None, None, :]
        results = tl.load(part_results + places[:, :, None] * HEAD_DIM + columns[None, None, :], mask=inside, other=0.0)
        new_max = tl.maximum(score_max, tl.max(scores, axis=0))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        shrink = tl.exp2(score_max - finite_max)
        weights = tl.exp2(scores - finite_max[None, :])
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=0)
        joined = joined * shrink[:, None] + tl.sum(results * weights[:, :, None], axis=0)
        score_max = new_max
    joined = joined / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    places = sequence * out_row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
    inside = (own < HEADS)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out + places, joined.to(out.dtype.element_ty), mask=inside)


def cut_into_parts(
    context_lens: torch.Tensor, num_kv_heads: int, num_programs: int, *, sliding_window: int
) -> DecodeParts:
    """For sequences of ``context_lens`` [num_seqs] int32: about so many programs, but none of less than 64 keys."""
    num_seqs = context_lens.shape[0]
    num_wanted = max(1, num_programs // num_kv_heads)
    starts = torch.empty(num_seqs + 2, dtype=torch.int32, device=context_lens.device)
    _cut_into_parts(
        (1, 1, 1),
        (context_lens, starts, num_seqs, num_wanted),
        (_PART_TOKENS_MULTIPLE, sliding_window, power_of_two_from(num_seqs)),
    )
    # Each sequence has at most one part that is not full.
    return DecodeParts(starts, num_wanted + num_seqs)


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    parts: DecodeParts,
    shape: TileShape,
    *,
    scale: float,
    sliding_window: int,
) -> None:
    """Attention of the first rows of ``query``, one for each of ``context_lens`` [num_seqs], into those of ``out``.

    ``parts`` is what ``cut_into_parts`` made of the same contexts. Where a context is of no tokens, nothing is written.
    """
    num_seqs = context_lens.shape[0]
    if num_seqs == 0:
        return
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    num_heads = query.shape[1] // head_dim
    group, columns = num_heads // num_kv_heads, head_columns(head_dim)
    part_results = torch.empty((parts.num_parts_max * num_heads, head_dim), dtype=torch.float32, device=query.device)
    part_scores = torch.empty(parts.num_parts_max * num_heads, dtype=torch.float32, device=query.device)
    tensors = (query, key_cache, value_cache, out, part_results, part_scores, context_lens, block_tables)
    strides = (query.stride(0), out.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3])
    _decode_attention(
        (parts.num_parts_max, num_kv_heads, 1),
        (*tensors, parts.starts, *strides, block_tables.stride(0), num_seqs, scale * LOG2_E),
        (group, shape.num_rows, shape.num_keys, _PART_TOKENS_MULTIPLE, block_size, head_dim, columns, sliding_window,
         num_kv_heads, _SHORT_PART_TOKENS),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )  # fmt: skip
    # Few sequences have many parts each, many have few.
    num_own, num_at_once = (group, 4) if num_seqs >= _SEQUENCES_MANY else (1, 16)
    _join_parts(
        (num_seqs, num_heads // num_own, 1),
        (part_results, part_scores, out, parts.starts, out.stride(0), num_heads),
        (num_at_once, num_own, power_of_two_from(num_own), head_dim, columns),
    )
