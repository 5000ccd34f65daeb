"""Products of few rows with a large weight, which are bound by how fast the weight streams from memory.

The weight is the left operand, so that few rows do not leave tensor cores idle, and the sum over its columns is
split where there are too few tiles for all multiprocessors; a second kernel then adds the parts.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Rows of the weight and columns that are multiplied at once, parts of the sum, and how it is compiled."""

    num_weight_rows: int
    num_columns: int
    num_parts: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_linear(
    x, weight, bias, out, num_rows, out_width, in_width, x_row_stride, weight_row_stride,
    ROWS: tl.constexpr, WEIGHT_ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program for WEIGHT_ROWS results of all rows, and one part of the sum; ``out`` is [parts, rows, width]."""
    part, num_parts = tl.program_id(1), tl.num_programs(1)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    weight_rows = tl.program_id(0) * WEIGHT_ROWS + tl.arange(0, WEIGHT_ROWS)
    is_row = rows < num_rows
    num_tiles = in_width // COLUMNS
    first, end = part * num_tiles // num_parts, (part + 1) * num_tiles // num_parts
    weight_places = weight + weight_rows.to(tl.int64)[:, None] * weight_row_stride + columns[None, :]
    x_places = x + rows[:, None] * x_row_stride + columns[None, :]
    sums = tl.zeros((WEIGHT_ROWS, ROWS), dtype=tl.float32)
    for tile in range(first, end):
        left = tl.load(weight_places + tile * COLUMNS)
        right = tl.load(x_places + tile * COLUMNS, mask=is_row[:, None], other=0.0)
        sums = tl.dot(left, tl.trans(right), sums)
    if HAS_BIAS:
        sums += tl.load(bias + weight_rows).to(tl.float32)[:, None]
    places = out + (part * num_rows + rows)[None, :] * out_width + weight_rows[:, None]
    tl.store(places, sums.to(out.dtype.element_ty), mask=is_row[None, :])


@triton.jit(do_not_specialize=["size", "num_parts"])
def _sum_of_parts(
    parts, bias, out, size, out_width, num_parts, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    places = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = places < size
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    for part in range(num_parts):
        sums += tl.load(parts + part * size + places, mask=inside, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + places % out_width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=inside)


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: LinearShape
) -> torch.Tensor:
    """``x @ weight.T + bias``: ``x`` [num_rows, in_width], ``weight`` [out_width, in_width], both with dense rows.

    Of the weight's sides one is a multiple of the shape's rows, the other of its columns.
    """
    num_rows, in_width = x.shape
    out_width = weight.shape[0]
    out = torch.empty((num_rows, out_width), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    num_parts = shape.num_parts
    result = out
    if num_parts > 1:
        result = torch.empty((num_parts, num_rows, out_width), dtype=torch.float32, device=x.device)
    _few_rows_linear[out_width // shape.num_weight_rows, num_parts](
        x,
        weight,
        out if bias is None else bias,
        result,
        num_rows,
        out_width,
        in_width,
        x.stride(0),
        weight.stride(0),
        ROWS=max(16, triton.next_power_of_2(num_rows)),
        WEIGHT_ROWS=shape.num_weight_rows,
        COLUMNS=shape.num_columns,
        HAS_BIAS=bias is not None and num_parts == 1,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if num_parts > 1:
        size = num_rows * out_width
        _sum_of_parts[(triton.cdiv(size, 1024),)](
            result,
            out if bias is None else bias,
            out,
            size,
            out_width,
            num_parts,
            HAS_BIAS=bias is not None,
            COLUMNS=1024,
        )
    return out
