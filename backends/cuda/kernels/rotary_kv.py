"""Rotary position embedding and the write into the paged KV cache in one pass, head norms before it where wanted."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.early_start import wait_for_kernel_before
from backends.cuda.kernels.kernel_launcher import KernelLauncher


@triton.jit
def _turned_heads(
    row_start,
    heads,
    inside_heads,
    columns,
    inside_columns,
    cosines,
    sines,
    weight,
    epsilon,
    HEAD_DIM: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Both halves, turned, of the heads of one row: two [HEADS, COLUMNS], each of COLUMNS >= HEAD_DIM / 2."""
    half: tl.constexpr = HEAD_DIM // 2
    inside = inside_heads[:, None] & inside_columns[None, :]
    places = row_start + heads[:, None] * HEAD_DIM + columns[None, :]
    first = tl.load(places, mask=inside, other=0.0)
    second = tl.load(places + half, mask=inside, other=0.0)
    dtype: tl.constexpr = first.dtype
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    if NORMS:
        squares = tl.sum(wide_first * wide_first, axis=1) + tl.sum(wide_second * wide_second, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + epsilon)[:, None]
        first_weights = tl.load(weight + columns, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
        second_weights = tl.load(weight + half + columns, mask=inside_columns, other=0.0).to(tl.float32)[None, :]
        # Rounded where the separate operators round: after the norm, and after its weight.
        wide_first = ((wide_first * scale).to(dtype).to(tl.float32) * first_weights).to(dtype).to(tl.float32)
        wide_second = ((wide_second * scale).to(dtype).to(tl.float32) * second_weights).to(dtype).to(tl.float32)
    turned_first = wide_first * cosines[None, :] - wide_second * sines[None, :]
    turned_second = wide_second * cosines[None, :] + wide_first * sines[None, :]
    return turned_first.to(dtype), turned_second.to(dtype)


@KernelLauncher
@triton.jit(do_not_specialize_on_alignment=["positions", "slot_mapping"])
def _rotary_kv_write(
    query, key, value, positions, cos_sin, query_weight, key_weight, slot_mapping, out, key_cache, value_cache,
    query_row_stride, key_row_stride, value_row_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    num_heads, num_kv_heads, block_size, epsilon,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, COLUMNS: tl.constexpr, NORMS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program for all heads of a row. A negative slot is written nowhere."""
    wait_for_kernel_before(EARLY)
    half: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside_columns = columns < half
    table_row = cos_sin + tl.load(positions + row).to(tl.int64) * HEAD_DIM
    cosines = tl.load(table_row + columns, mask=inside_columns, other=0.0)
    sines = tl.load(table_row + half + columns, mask=inside_columns, other=0.0)

    heads = tl.arange(0, HEADS)
    inside_heads = heads < num_heads
    first, second = _turned_heads(
        query + row * query_row_stride, heads, inside_heads, columns, inside_columns, cosines, sines,
        query_weight, epsilon, HEAD_DIM, NORMS,
    )  # fmt: skip
    inside = inside_heads[:, None] & inside_columns[None, :]
    places = out + row * num_heads * HEAD_DIM + heads[:, None] * HEAD_DIM + columns[None, :]
    tl.store(places, first, mask=inside)
    tl.store(places + half, second, mask=inside)

    slot = tl.load(slot_mapping + row).to(tl.int64)
    if slot < 0:
        return
    kv_heads = tl.arange(0, KV_HEADS)
    inside_heads = kv_heads < num_kv_heads
    first, second = _turned_heads(
        key + row * key_row_stride, kv_heads, inside_heads, columns, inside_columns, cosines, sines,
        key_weight, epsilon, HEAD_DIM, NORMS,
    )  # fmt: skip
    block, offset = slot // block_size, slot % block_size
    inside = inside_heads[:, None] & inside_columns[None, :]
    places = key_cache + block * key_block_stride + offset * key_slot_stride
    places += kv_heads[:, None] * key_head_stride + columns[None, :]
    tl.store(places, first.to(key_cache.dtype.element_ty), mask=inside)
    tl.store(places + half, second.to(key_cache.dtype.element_ty), mask=inside)

    places = value + row * value_row_stride + kv_heads[:, None] * HEAD_DIM + columns[None, :]
    first = tl.load(places, mask=inside, other=0.0)
    second = tl.load(places + half, mask=inside, other=0.0)
    places = value_cache + block * value_block_stride + offset * value_slot_stride
    places += kv_heads[:, None] * value_head_stride + columns[None, :]
    tl.store(places, first.to(value_cache.dtype.element_ty), mask=inside)
    tl.store(places + half, second.to(value_cache.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of query and key heads; the weights are [head_dim]."""

    query_weight: torch.Tensor
    key_weight: torch.Tensor
    epsilon: float


def rotary_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Writes turned keys, and values, to their slots; the turned queries [num_tokens, num_heads * head_dim].

    ``cos_sin`` is a contiguous float32 table [num_positions, head_dim].
    """
    return _launch(query, key, value, positions, cos_sin, key_cache, value_cache, slot_mapping, None)


def head_norm_rotary_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    epsilon: float,
) -> torch.Tensor:
    """``rotary_kv_write`` of queries and keys whose heads are normed before."""
    norms = HeadNorms(query_weight, key_weight, epsilon)
    return _launch(query, key, value, positions, cos_sin, key_cache, value_cache, slot_mapping, norms)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norms: HeadNorms | None,
) -> torch.Tensor:
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    num_rows, num_heads = query.shape[0], query.shape[1] // head_dim
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_rows == 0:
        return out
    tensors = (
        query,
        key,
        value,
        positions,
        cos_sin,
        query if norms is None else norms.query_weight,
        query if norms is None else norms.key_weight,
        slot_mapping,
        out,
        key_cache,
        value_cache,
    )
    strides = (query.stride(0), key.stride(0), value.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3])
    constants = (
        head_dim,
        triton.next_power_of_2(num_heads),
        triton.next_power_of_2(num_kv_heads),
        triton.next_power_of_2(head_dim // 2),
        norms is not None,
    )
    epsilon = 0.0 if norms is None else norms.epsilon
    _rotary_kv_write((num_rows, 1, 1), (*tensors, *strides, num_heads, num_kv_heads, block_size, epsilon), constants)
    return out
