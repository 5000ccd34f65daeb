"""Paged attention of sequences with one row each, the keys of all shared out evenly.

The tiles of all sequences lie one behind the other, and every program gets as many of them, beginning and ending where
it may: so the device is evenly busy, with few sequences and with some that are much longer than others. A second
kernel joins what several programs found for a sequence (Dao et al. 2023, Flash-Decoding). How many tiles a share is
follows from the contexts, on the device, once for each step: a captured launch stays right for any batch. The query
heads that share a key-value head are the rows of one tile.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.attention_tile import attend_range
from backends.cuda.kernels.early_start import wait_for_kernel_before
from backends.cuda.kernels.kernel_launcher import KernelLauncher
from backends.cuda.kernels.tile_shapes import LOG2_E, TileShape, head_columns, power_of_two_from

_TILE_KEYS = 64  # that contexts are counted in; a multiple of the keys of any tile
_PARTS_AT_ONCE = 8
_SHARES_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class DecodeShares:
    """How the tiles of a step's sequences are shared out."""

    starts: torch.Tensor  # [num_seqs + 2] int32: each sequence's first tile, the number of tiles, tiles of a share
    sequences: torch.Tensor  # [num_shares, 2] int32: the first and the last sequence that a share has tiles of
    num_shares: int  # at most


@triton.jit
def _first_tile_key(context_len, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """The first key of the first tile that is read."""
    if WINDOW > 0:
        return tl.maximum(context_len - WINDOW, 0) // KEYS * KEYS
    return context_len * 0


@KernelLauncher
@triton.jit(do_not_specialize=["num_seqs", "num_shares"], do_not_specialize_on_alignment=["context_lens"])
def _share_out(
    context_lens, starts, share_sequences, num_seqs, num_shares,
    KEYS: tl.constexpr, WINDOW: tl.constexpr, SEQUENCES: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """One program for all: every share is of the same number of tiles, but the last."""
    sequences = tl.arange(0, SEQUENCES)
    inside = sequences < num_seqs
    lens = tl.load(context_lens + sequences, mask=inside, other=0)
    counts = tl.cdiv(lens - _first_tile_key(lens, KEYS, WINDOW), KEYS)
    share_len = tl.maximum(tl.cdiv(tl.sum(counts, axis=0), num_shares), 1)
    ends, num_tiles = tl.cumsum(counts, axis=0), tl.sum(counts, axis=0)
    tl.store(starts + sequences, ends - counts, mask=inside)
    tl.store(starts + num_seqs, num_tiles)
    tl.store(starts + num_seqs + 1, share_len)
    for first_share in range(0, num_shares, SHARES):
        shares = first_share + tl.arange(0, SHARES)
        first_tiles = shares * share_len
        last_tiles = tl.minimum(first_tiles + share_len, num_tiles) - 1
        # A tile is of the sequence that comes after all those that end before it.
        firsts = tl.sum((ends[None, :] <= first_tiles[:, None]).to(tl.int32), axis=1)
        lasts = tl.sum((ends[None, :] <= last_tiles[:, None]).to(tl.int32), axis=1)
        tl.store(share_sequences + 2 * shares, firsts, mask=shares < num_shares)
        tl.store(share_sequences + 2 * shares + 1, lasts, mask=shares < num_shares)


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_seqs", "table_row_stride"],
    do_not_specialize_on_alignment=["context_lens", "block_tables"],
)
def _decode_attention(
    query, key_cache, value_cache, out, part_results, part_scores, context_lens, block_tables, starts,
    share_sequences, query_row_stride, out_row_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    table_row_stride, num_seqs, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for each share and key-value head. What it finds of a sequence that is all its own is final."""
    wait_for_kernel_before(EARLY)
    share = tl.program_id(0)
    kv_head = tl.program_id(1)
    share_len = tl.load(starts + num_seqs + 1)
    first_tile = share * share_len
    end_tile = tl.minimum(first_tile + share_len, tl.load(starts + num_seqs))
    if first_tile >= end_tile:
        return
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    heads = kv_head * GROUP + rows
    key_head = key_cache + kv_head.to(tl.int64) * key_head_stride
    value_head = value_cache + kv_head.to(tl.int64) * value_head_stride
    first_sequence = tl.load(share_sequences + 2 * share)
    last_sequence = tl.load(share_sequences + 2 * share + 1)
    for sequence in range(first_sequence, last_sequence + 1):
        row = tl.cast(sequence, tl.int64)
        own_first_tile = tl.load(starts + sequence)
        own_end_tile = tl.load(starts + sequence + 1)
        context_len = tl.load(context_lens + sequence)
        begin_tile = tl.maximum(first_tile, own_first_tile)
        until_tile = tl.minimum(end_tile, own_end_tile)
        places = row * query_row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
        tile_query = tl.load(query + places, mask=inside, other=0.0)
        first_seen_key = context_len * 0
        if WINDOW > 0:
            first_seen_key = tl.maximum(context_len - WINDOW, 0)
        base_key = _first_tile_key(context_len, TILE_KEYS, WINDOW)
        end_key = tl.minimum(base_key + (until_tile - own_first_tile) * TILE_KEYS, context_len)
        result, weight_sum, score_max = attend_range(
            tile_query,
            tl.zeros((ROWS,), dtype=tl.int32) + (context_len - 1),
            key_head,
            value_head,
            block_tables + row * table_row_stride,
            base_key + (begin_tile - own_first_tile) * TILE_KEYS,
            end_key,
            first_seen_key,
            end_key // KEYS * KEYS,
            key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
            scale, ROWS, BLOCK_SIZE, HEAD_DIM, COLUMNS, KEYS, WINDOW, False,
        )  # fmt: skip
        result = result / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
        is_all = (begin_tile == own_first_tile) & (until_tile == own_end_tile) & (own_end_tile > own_first_tile)
        out_places = row * out_row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
        # Shares and sequences both rise, so no two parts have the same sum.
        part_places = (share + row) * (KV_HEADS * GROUP) + heads
        tl.store(out + out_places, result.to(out.dtype.element_ty), mask=inside & is_all)
        inside_part = inside & (is_all == 0)
        tl.store(part_results + part_places[:, None] * HEAD_DIM + columns[None, :], result, mask=inside_part)
        tl.store(part_scores + part_places, score_max + tl.log2(weight_sum), mask=(rows < GROUP) & (is_all == 0))


@KernelLauncher
@triton.jit(do_not_specialize=["num_seqs"])
def _join_parts(
    part_results, part_scores, out, starts, out_row_stride, num_heads, num_seqs,
    PARTS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program for a head of a sequence: parts weighed by the sum of their exponentials, 2 ** score."""
    wait_for_kernel_before(EARLY)
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    share_len = tl.load(starts + num_seqs + 1)
    first_tile = tl.load(starts + sequence)
    end_tile = tl.load(starts + sequence + 1)
    first_share = first_tile // share_len
    end_share = (end_tile - 1) // share_len + 1
    if (end_tile == first_tile) | (end_share - first_share < 2):
        return
    columns = tl.arange(0, COLUMNS)
    score_max = tl.full((1,), float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros((1,), dtype=tl.float32)
    joined = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(first_share, end_share, PARTS):
        shares = first + tl.arange(0, PARTS)
        is_part = shares < end_share
        places = (shares + sequence) * num_heads + head
        scores = tl.load(part_scores + places, mask=is_part, other=float("-inf"))
        inside = is_part[:, None] & (columns < HEAD_DIM)[None, :]
        results = tl.load(part_results + places[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        new_max = tl.maximum(score_max, tl.max(scores, axis=0))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        shrink = tl.exp2(score_max - finite_max)
        weights = tl.exp2(scores - finite_max)
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=0)
        joined = joined * shrink + tl.sum(results * weights[:, None], axis=0)
        score_max = new_max
    joined = joined / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    place = sequence * out_row_stride + head * HEAD_DIM + columns
    tl.store(out + place, joined.to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def share_out(context_lens: torch.Tensor, num_kv_heads: int, num_programs: int, *, sliding_window: int) -> DecodeShares:
    """For sequences of ``context_lens`` [num_seqs] int32: so many programs, but none without a tile of 64 keys."""
    num_seqs = context_lens.shape[0]
    num_shares = max(1, num_programs // num_kv_heads)
    starts = torch.empty(num_seqs + 2, dtype=torch.int32, device=context_lens.device)
    sequences = torch.empty(num_shares, 2, dtype=torch.int32, device=context_lens.device)
    _share_out(
        (1, 1, 1),
        (context_lens, starts, sequences, num_seqs, num_shares),
        (_TILE_KEYS, sliding_window, power_of_two_from(num_seqs), _SHARES_AT_ONCE),
    )
    return DecodeShares(starts, sequences, num_shares)


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    shares: DecodeShares,
    shape: TileShape,
    *,
    scale: float,
    sliding_window: int,
) -> None:
    """Attention of the first rows of ``query``, one for each of ``context_lens`` [num_seqs], into those of ``out``.

    ``shares`` is what ``share_out`` made of the same contexts. Where a context is of no tokens, nothing is written.
    """
    num_seqs = context_lens.shape[0]
    if num_seqs == 0:
        return
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    num_heads = query.shape[1] // head_dim
    num_parts_max, columns = (shares.num_shares + num_seqs) * num_heads, head_columns(head_dim)
    part_results = torch.empty((num_parts_max, head_dim), dtype=torch.float32, device=query.device)
    part_scores = torch.empty(num_parts_max, dtype=torch.float32, device=query.device)
    tensors = (query, key_cache, value_cache, out, part_results, part_scores, context_lens, block_tables)
    strides = (query.stride(0), out.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3])
    _decode_attention(
        (shares.num_shares, num_kv_heads, 1),
        (*tensors, shares.starts, shares.sequences, *strides, block_tables.stride(0), num_seqs, scale * LOG2_E),
        (num_heads // num_kv_heads, shape.num_rows, shape.num_keys, _TILE_KEYS, block_size, head_dim, columns,
         sliding_window, num_kv_heads),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )  # fmt: skip
    _join_parts(
        (num_seqs, num_heads, 1),
        (part_results, part_scores, out, shares.starts, out.stride(0), num_heads, num_seqs),
        (_PARTS_AT_ONCE, head_dim, columns),
        num_warps=1,
    )
