"""RMS norms: of rows, of rows after adding the residual, of heads."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.early_start import wait_for_kernel_before
from backends.cuda.kernels.kernel_launcher import KernelLauncher

ROW_WIDTH_MAX = 65536  # a row is held in the registers of one program


@triton.jit
def normed(wide, weight, mean_width, epsilon, dtype: tl.constexpr):
    """``wide`` [rows, columns] (zeros beyond the width) normed in float32, rounded, and times the weight [columns]."""
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / mean_width + epsilon)
    rounded = (wide * scale[:, None]).to(dtype)
    return (rounded.to(tl.float32) * weight[None, :].to(tl.float32)).to(dtype)


@KernelLauncher
@triton.jit
def _norm_rows(
    x,
    residual,
    weight,
    out,
    sums,
    x_row_stride,
    residual_row_stride,
    width,
    epsilon,
    ADDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program for each row; ``out`` and ``sums`` are contiguous."""
    wait_for_kernel_before(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < width
    value = tl.load(x + row * x_row_stride + columns, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(residual + row * residual_row_stride + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(sums + row * width + columns, value, mask=inside)
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    result = normed(value.to(tl.float32)[None, :], weights, width, epsilon, value.dtype)
    tl.store(out + row * width + columns, tl.reshape(result, (COLUMNS,)), mask=inside)


@KernelLauncher
@triton.jit
def _norm_heads(
    x,
    weight,
    out,
    x_row_stride,
    num_heads,
    epsilon,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program for all heads of a row."""
    wait_for_kernel_before(EARLY)
    row = tl.program_id(0).to(tl.int64)
    heads, columns = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    inside = (heads < num_heads)[:, None] & (columns < HEAD_DIM)[None, :]
    places = heads[:, None] * HEAD_DIM + columns[None, :]
    value = tl.load(x + row * x_row_stride + places, mask=inside, other=0.0)
    weights = tl.load(weight + columns, mask=columns < HEAD_DIM, other=0.0)
    result = normed(value.to(tl.float32), weights, HEAD_DIM, epsilon, value.dtype)
    tl.store(out + row * num_heads * HEAD_DIM + places, result, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    """``x`` [num_tokens, width], ``weight`` [width]: [num_tokens, width]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rows(x, None, weight, out, None, epsilon)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, and that sum; all [num_tokens, width]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty_like(out)
    _launch_rows(x, residual, weight, out, sums, epsilon)
    return out, sums


def head_rms_norm(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    """``x`` [num_tokens, num_heads * head_dim], ``weight`` [head_dim]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows, head_dim = x.shape[0], weight.shape[0]
    num_heads = x.shape[1] // head_dim
    if num_rows:
        constants = (head_dim, triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim))
        _norm_heads((num_rows, 1, 1), (x, weight, out, x.stride(0), num_heads, epsilon), constants)
    return out


def _launch_rows(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor | None,
    epsilon: float,
) -> None:
    num_rows, width = x.shape
    if num_rows == 0:
        return
    columns = triton.next_power_of_2(width)
    tensors = (x, x if residual is None else residual, weight, out, out if sums is None else sums)
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    _norm_rows(
        (num_rows, 1, 1),
        (*tensors, *strides, width, epsilon),
        (residual is not None, columns),
        num_warps=min(max(columns // 512, 1), 16),
    )
