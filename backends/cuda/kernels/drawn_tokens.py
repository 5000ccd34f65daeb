"""Where drawn tokens go: to the tokens of their requests, and to what the host is told."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.kernel_launcher import KernelLauncher

_ROWS = 256


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["token_ids", "is_invalid", "cells", "token_table", "outcome"],
)
def _keep_drawn(token_ids, is_invalid, cells, token_table, outcome, num_rows, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    drawn = tl.load(token_ids + rows, mask=inside, other=0).to(tl.int32)
    says_nothing = tl.load(is_invalid + rows, mask=inside, other=0) != 0
    tl.store(token_table + tl.load(cells + rows, mask=inside, other=0), drawn, mask=inside)
    tl.store(outcome + rows, tl.where(says_nothing, -1, drawn), mask=inside)


def keep_drawn(
    token_ids: torch.Tensor,
    is_invalid: torch.Tensor,
    cells: torch.Tensor,
    token_table: torch.Tensor,
    outcome: torch.Tensor,
) -> None:
    """Write ``token_ids`` [num_rows] int64 to these cells [num_rows] int64 of ``token_table`` int32, counted through
    its rows, and to outcome [num_rows] int32, there -1 where ``is_invalid`` [num_rows] bool.
    """
    num_rows = token_ids.numel()
    _keep_drawn(
        (triton.cdiv(num_rows, _ROWS), 1, 1),
        (token_ids, is_invalid, cells, token_table, outcome, num_rows),
        (_ROWS,),
    )
