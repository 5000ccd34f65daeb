"""Paged attention of sequences with one row each, the keys of each split into parts.

With few sequences a device would stand idle if each were one program, so several programs share a
sequence's keys, and a second kernel joins their parts (Dao et al. 2023, Flash-Decoding). The query heads
that share a key-value head are the rows of one tile.
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
from backends.cuda.kernels.tile_shapes import LOG2_E, PARTS_MAX, TileShape, head_columns


@triton.jit
def _parts_of(num_programs, num_wanted, PARTS_MAX: tl.constexpr):
    """Into how many parts keys are split where so many programs are wanted."""
    return tl.minimum(tl.maximum(num_wanted // tl.maximum(num_programs, 1), 1), PARTS_MAX)


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_parts", "table_row_stride"],
    do_not_specialize_on_alignment=["context_lens", "block_tables", "decode_count"],
)
def _decode_attention(
    query, key_cache, value_cache, out, part_results, part_scores, context_lens, block_tables, decode_count,
    query_row_stride, out_row_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    table_row_stride, num_parts, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, IS_SPLIT: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, KV_HEADS: tl.constexpr,
    COUNTS: tl.constexpr, PARTS_MAX: tl.constexpr,
):  # fmt: skip
    """One program for each sequence, key-value head and part. Unless it is split the result is final.

    ``COUNTS``: the number of sequences is read, and what they are split into follows; ``num_parts`` then is the number
    of programs.
    """
    if COUNTS:
        num_sequences = tl.load(decode_count)
        num_parts = _parts_of(num_sequences * KV_HEADS, num_parts, PARTS_MAX)
        place = tl.program_id(0)
        part = place % num_parts
        kv_head = place // num_parts % KV_HEADS
        sequence = (place // (num_parts * KV_HEADS)).to(tl.int64)
        if sequence >= num_sequences:
            return
    else:
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
        num_heads = KV_HEADS * GROUP
        places = (sequence * num_heads + heads) * num_parts + part
        tl.store(part_results + places[:, None] * HEAD_DIM + columns[None, :], result, mask=inside)
        tl.store(part_scores + places, score_max + tl.log2(weight_sum), mask=rows < GROUP)
    else:
        places = sequence * out_row_stride + heads[:, None] * HEAD_DIM + columns[None, :]
        tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)


@KernelLauncher
@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=["decode_count"])
def _join_parts(
    part_results,
    part_scores,
    out,
    decode_count,
    out_row_stride,
    num_parts,
    PARTS_MAX: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """One program for each sequence and head: parts weighed by the sum of their exponentials, 2 ** score."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if COUNTS:
        num_sequences = tl.load(decode_count)
        if sequence >= num_sequences:
            return
        num_parts = _parts_of(num_sequences * KV_HEADS, num_parts, PARTS_MAX)
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
    num_seqs, num_kv_heads = context_lens.shape[0], key_cache.shape[2]
    if num_seqs:
        launch = _DecodeLaunch(
            query, key_cache, value_cache, out, context_lens, block_tables, context_lens, shape, scale, sliding_window
        )
        launch.run(
            (num_seqs, num_kv_heads, num_parts), num_seqs * num_kv_heads * num_parts, num_parts, is_split=num_parts > 1
        )


def counted_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    decode_count: torch.Tensor,
    num_programs: int,
    shape: TileShape,
    *,
    scale: float,
    sliding_window: int,
) -> None:
    """The same of the first ``decode_count`` [1] int32 sequences, a number that is read on the device.

    Keys are cut into as many parts as make about ``num_programs`` programs, whatever the number of sequences. Other
    rows of ``out`` are not written.
    """
    num_programs = max(num_programs, context_lens.shape[0] * key_cache.shape[2])
    launch = _DecodeLaunch(
        query, key_cache, value_cache, out, context_lens, block_tables, decode_count, shape, scale, sliding_window
    )
    launch.run((num_programs, 1, 1), num_programs, num_programs, is_split=True, counts=True)


@dataclass(frozen=True, slots=True)
class _DecodeLaunch:
    """The arguments of both kernels."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    out: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    decode_count: torch.Tensor
    shape: TileShape
    scale: float
    sliding_window: int

    def run(
        self, grid: tuple[int, int, int], num_places: int, num_parts: int, *, is_split: bool, counts: bool = False
    ) -> None:
        """``num_places``: parts of all sequences and key-value heads, at most."""
        query, out, shape = self.query, self.out, self.shape
        _, block_size, num_kv_heads, head_dim = self.key_cache.shape
        num_heads = query.shape[1] // head_dim
        group = num_heads // num_kv_heads
        part_results = part_scores = out
        if is_split:
            part_results = torch.empty((num_places * group, head_dim), dtype=torch.float32, device=query.device)
            part_scores = torch.empty(num_places * group, dtype=torch.float32, device=query.device)
        tensors = (query, self.key_cache, self.value_cache, out, part_results, part_scores)
        strides = (query.stride(0), out.stride(0), *self.key_cache.stride()[:3], *self.value_cache.stride()[:3])
        columns = head_columns(head_dim)
        _decode_attention(
            grid,
            (*tensors, self.context_lens, self.block_tables, self.decode_count, *strides, self.block_tables.stride(0),
             num_parts, self.scale * LOG2_E),
            (group, shape.num_rows, shape.num_keys, is_split, block_size, head_dim, columns, self.sliding_window,
             num_kv_heads, counts, PARTS_MAX),
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )  # fmt: skip
        if is_split:
            _join_parts(
                (self.context_lens.shape[0], num_heads, 1),
                (part_results, part_scores, out, self.decode_count, out.stride(0), num_parts),
                (PARTS_MAX, 16, head_dim, columns, num_kv_heads, counts),
            )
