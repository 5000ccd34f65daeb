"""Paged attention of sequences with any number of rows: prompts, chunks of prompts, and decodes too.

The query heads that share a key-value head are packed into one tile of rows, so that keys are read once for
all of them.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.attention_tile import attend_range
from backends.cuda.kernels.kernel_launcher import KernelLauncher
from backends.cuda.kernels.prompt_tiles import PromptTiles
from backends.cuda.kernels.tile_shapes import LOG2_E, TileShape, head_columns


@KernelLauncher
@triton.jit(
    do_not_specialize=["table_row_stride"],
    do_not_specialize_on_alignment=["tiles", "num_tiles", "block_tables"],
)
def _prefill_attention(
    query, key_cache, value_cache, out, tiles, num_tiles, block_tables,
    query_row_stride, out_row_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    table_row_stride, scale,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program for each tile of TOKENS tokens x GROUP heads and each key-value head."""
    place = tl.program_id(0)
    if place >= tl.load(num_tiles):
        return
    kv_head = tl.program_id(1).to(tl.int64)
    first_row = tl.load(tiles + 4 * place)
    num_rows = tl.load(tiles + 4 * place + 1)
    first_position = tl.load(tiles + 4 * place + 2)
    sequence = tl.load(tiles + 4 * place + 3)
    context_len = first_position + num_rows

    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tokens = rows // GROUP
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
        first_position + tokens,
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
    tiles: PromptTiles,
    block_tables: torch.Tensor,
    shape: TileShape,
    *,
    scale: float,
    sliding_window: int,
) -> None:
    """Attention of the rows of ``tiles`` of ``query`` [num_tokens, num_heads * head_dim] into those of ``out``.

    Tiles are of ``shape.num_rows`` // (heads of a group) tokens, ``block_tables`` [num_seqs, num_blocks_max] int32.
    Nothing is read back from the device.
    """
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    group = query.shape[1] // head_dim // num_kv_heads
    tokens = shape.num_rows // group
    tensors = (query, key_cache, value_cache, out, tiles.tiles, tiles.num_tiles, block_tables)
    strides = (query.stride(0), out.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3])
    _prefill_attention(
        (tiles.num_places, num_kv_heads, 1),
        (*tensors, *strides, block_tables.stride(0), scale * LOG2_E),
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
