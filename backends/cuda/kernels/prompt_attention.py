"""Attention of prompts and their chunks: by the kernel for Hopper where the device and the heads are such."""

import logging
from dataclasses import dataclass
from functools import cache

import torch

from backends.cuda.kernel_trial import why_it_fails
from backends.cuda.kernels.prefill_attention import prefill_attention
from backends.cuda.kernels.tile_shapes import fit_hopper_tiles, hopper_tiles, prefill_tile

_LOG = logging.getLogger(__name__)
_HOPPER = 9  # major compute capability
_HOLDING_LARGE_TILES = (9, 10)  # compute capabilities 8 and 12 have less shared memory, 8.0 itself 163 KiB


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Sequences of any number of rows, which follow each other in the step. Nothing of it is read back."""

    query_starts: torch.Tensor  # [num_seqs + 1] int32, rows of the whole step
    context_lens: torch.Tensor  # [num_seqs] int32
    block_tables: torch.Tensor  # [num_seqs, num_blocks_max] int32
    num_rows_max: int
    context_len_max: int


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
    where = (rows.query_starts, rows.context_lens, rows.block_tables, rows.num_rows_max)
    operands = _Operands(query.device, query.dtype, block_size, num_kv_heads, group, head_dim)
    is_plain = sliding_window == 0 and key_cache.is_contiguous() and value_cache.is_contiguous()
    if is_plain and key_cache.dtype == query.dtype and _takes_hopper(operands):
        from backends.cuda.kernels.hopper_attention import hopper_attention

        tiles = hopper_tiles(rows.context_len_max)
        hopper_attention(query, key_cache, value_cache, out, *where, tiles, scale=scale)
        return
    has_large_tiles = _compute_capability(query.device) in _HOLDING_LARGE_TILES
    shape = prefill_tile(head_dim, group, query.element_size(), rows.context_len_max, has_large_tiles)
    prefill_attention(query, key_cache, value_cache, out, *where, shape, scale=scale, sliding_window=sliding_window)


@cache
def _takes_hopper(operands: _Operands) -> bool:
    """Whether the kernel for Hopper computes this here, which is tried once."""
    if _compute_capability(operands.device) != _HOPPER:
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
    where = (lengths[:2], lengths[2:], table, 1)
    hopper_attention(query, cache, cache, torch.empty_like(query), *where, hopper_tiles(1), scale=1.0)


@cache
def _compute_capability(device: torch.device) -> int:
    """The major one; of a CPU, which interprets kernels, none."""
    return 0 if device.type == "cpu" else torch.cuda.get_device_properties(device).major
