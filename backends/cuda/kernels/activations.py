"""The gate of a gated perceptron."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.early_start import wait_for_kernel_before
from backends.cuda.kernels.kernel_launcher import KernelLauncher

_COLUMNS = 1024


@KernelLauncher
@triton.jit
def _silu_multiply(
    x,
    out,
    row_stride,
    width,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program for a stretch of a row; ``out`` is contiguous."""
    wait_for_kernel_before(EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    gates = tl.load(x + row * row_stride + columns, mask=inside, other=0.0)
    ups = tl.load(x + row * row_stride + width + columns, mask=inside, other=0.0)
    wide = gates.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gates.dtype)
    result = (activated.to(tl.float32) * ups.to(tl.float32)).to(gates.dtype)
    tl.store(out + row * width + columns, result, mask=inside)


def silu_multiply(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``x`` [num_tokens, 2 * width], the gate's columns first: [num_tokens, width]."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if num_rows:
        _silu_multiply((num_rows, triton.cdiv(width, _COLUMNS), 1), (x, out, x.stride(0), width), (_COLUMNS,))
    return out
