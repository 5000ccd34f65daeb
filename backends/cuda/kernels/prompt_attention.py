"""Attention of prompts and their chunks: by the kernel for Hopper where the device and the heads are such."""

import logging
from dataclasses import dataclass
from functools import cache

import torch

from backends.cuda.kernel_trial import why_it_fails
from backends.cuda.kernels.device_properties import HOPPER, compute_capability, num_compute_units
from backends.cuda.kernels.prefill_attention import prefill_attention
from backends.cuda.kernels.prompt_tiles import PromptTiles, lay_out_tiles
from backends.cuda.kernels.tile_shapes import HOPPER_ROWS, fit_hopper_tiles, hopper_tiles, prefill_tile

_LOG = logging.getLogger(__name__)
_HOLDING_LARGE_TILES = (9, 10)  # compute capabilities 8 and 12 have less shared memory, 8.0 itself 163 KiB


@dataclass(slots=True)
class PromptRows:
    """Sequences of any number of rows, which follow each other in the step. Nothing of it is read back."""

    query_starts: torch.Tensor  # [num_seqs + 1] int32, rows of the whole step
    context_lens: torch.Tensor  # [num_seqs] int32
    block_tables: torch.Tensor  # [num_seqs, num_blocks_max] int32
    num_rows_max: int
    context_len_max: int
    tiles: PromptTiles | None = None  # made by the first layer, which knows the kernel

    def in_tiles_of(self, num_tokens: int) -> PromptTiles:
        """The rows shared out among tiles of so many tokens."""
        if self.tiles is None or self.tiles.tokens_per_tile != num_tokens:
            self.tiles = lay_out_tiles(self.query_starts, self.context_lens, self.num_rows_max, num_tokens)
        return self.tiles


@dataclass(frozen=True, slots=True)
class _Operands:
    """What decides on the kernel."""

    device: torch.device
    dtype: torch.dtype
    block_size: int
    num_kv_heads: int
    group: int
    head_dim: int


def prompt_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    rows: PromptRows,
    *,
    scale: float,
    sliding_window: int,
) -> None:
    """Causal attention of these rows of ``query`` [num_tokens, num_heads * head_dim] into the same rows of ``out``."""
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    group = query.shape[1] // head_dim // num_kv_heads
    operands = _Operands(query.device, query.dtype, block_size, num_kv_heads, group, head_dim)
    is_plain = sliding_window == 0 and key_cache.is_contiguous() and value_cache.is_contiguous()
    if is_plain and key_cache.dtype == query.dtype and _takes_hopper(operands):
        from backends.cuda.kernels.hopper_attention import hopper_attention

        tiles, shape = rows.in_tiles_of(HOPPER_ROWS // group), hopper_tiles(rows.context_len_max)
        where = (tiles, rows.block_tables, shape, num_compute_units(query.device))
        hopper_attention(query, key_cache, value_cache, out, *where, scale=scale)
        return
    has_large_tiles = compute_capability(query.device) in _HOLDING_LARGE_TILES
    tile = prefill_tile(head_dim, group, query.element_size(), rows.context_len_max, has_large_tiles)
    among = (rows.in_tiles_of(tile.num_rows // group), rows.block_tables, tile)
    prefill_attention(query, key_cache, value_cache, out, *among, scale=scale, sliding_window=sliding_window)


@cache
def _takes_hopper(operands: _Operands) -> bool:
    """Whether the kernel for Hopper computes this here, which is tried once."""
    if compute_capability(operands.device) != HOPPER:
        return False
    if not fit_hopper_tiles(operands.head_dim, operands.group, operands.dtype.itemsize, operands.block_size):
        return False
    if reason := why_it_fails(lambda: _try_hopper(operands)):
        slower = "prompts' attention takes a slower kernel than this device could run"
        _LOG.warning("%s: %s, for this version of triton: %s", operands.device, slower, reason)
        return False
    return True


def _try_hopper(operands: _Operands) -> None:
    """One token."""
    from backends.cuda.kernels.hopper_attention import hopper_attention

    num_kv_heads, head_dim = operands.num_kv_heads, operands.head_dim
    query = torch.zeros(1, operands.group * num_kv_heads * head_dim, dtype=operands.dtype, device=operands.device)
    cache = query.new_zeros(1, operands.block_size, num_kv_heads, head_dim)
    lengths = torch.tensor([0, 1, 1], dtype=torch.int32, device=operands.device)
    table = torch.zeros(1, 16, dtype=torch.int32, device=operands.device)
    tiles = lay_out_tiles(lengths[:2], lengths[2:], 1, HOPPER_ROWS // operands.group)
    where = (tiles, table, hopper_tiles(1), 1)
    hopper_attention(query, cache, cache, torch.empty_like(query), *where, scale=1.0)
