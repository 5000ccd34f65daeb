"""Products of activations and weights: by the kernel for few rows on Hopper where it is faster, else by a library.

torch takes cuBLAS without a bias and cuBLASLt with one. On an H200 cuBLASLt is up to 20 % faster for weights no taller
than wide and some tens of rows, so that these get a bias of zeros; `docs/h200.md` has the table.
"""

import logging
from functools import cache

import torch
from torch.nn import functional

from backends.cuda.kernel_trial import why_it_fails
from backends.cuda.kernels.device_properties import HOPPER, compute_capability, num_compute_units
from backends.cuda.kernels.tile_shapes import PRODUCT_TILE, product_shape

_LOG = logging.getLogger(__name__)
_ROWS_MAX = 32
_WEIGHT_BYTES_MIN = 16 << 20  # smaller ones were not measured
_TILES_MAX = 4096
_LT_ROWS_MAX = 176
_ALIGNMENT_BYTES = 16  # that the tensor memory accelerator wants


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [num_rows, width] @ ``weight`` [num_columns, width] transposed + ``bias``."""
    if _has_few_rows(x, weight) and _takes_hopper(x.device, x.dtype):
        from backends.cuda.kernels.hopper_product import hopper_product

        num_columns, width = weight.shape
        shape = product_shape(x.shape[0], num_columns, width, num_compute_units(x.device))
        return hopper_product(x, weight, bias, _tile_counts(x.device), shape)
    if bias is None and _is_faster_with_bias(x, weight):
        bias = _zeros(x.device, x.dtype, weight.shape[0])
    return functional.linear(x, weight, bias)


def _has_few_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """And all else that the kernel for Hopper wants."""
    if x.dim() != 2 or not 0 < x.shape[0] <= _ROWS_MAX:
        return False
    num_columns, width = weight.shape
    if num_columns * width * weight.element_size() < _WEIGHT_BYTES_MIN or num_columns > _TILES_MAX * PRODUCT_TILE:
        return False
    is_known = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not is_known or not (x.is_contiguous() and weight.is_contiguous()):
        return False
    starts = (x.data_ptr(), weight.data_ptr(), width * x.element_size())
    return all(start % _ALIGNMENT_BYTES == 0 for start in starts)


def _is_faster_with_bias(x: torch.Tensor, weight: torch.Tensor) -> bool:
    num_columns, width = weight.shape
    if not _ROWS_MAX < x.shape[0] <= _LT_ROWS_MAX or num_columns > width or x.dim() != 2:
        return False
    return x.dtype in (torch.bfloat16, torch.float16) and compute_capability(x.device) == HOPPER


@cache
def _zeros(device: torch.device, dtype: torch.dtype, num_columns: int) -> torch.Tensor:
    return torch.zeros(num_columns, dtype=dtype, device=device)


@cache
def _takes_hopper(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel for Hopper computes this here, which is tried once."""
    if compute_capability(device) != HOPPER:
        return False
    if reason := why_it_fails(lambda: _try_hopper(device, dtype)):
        slower = "products of few rows take slower kernels than this device could run"
        _LOG.warning("%s: %s, for this version of triton: %s", device, slower, reason)
        return False
    return True


def _try_hopper(device: torch.device, dtype: torch.dtype) -> None:
    from backends.cuda.kernels.hopper_product import hopper_product

    zeros = torch.zeros(PRODUCT_TILE, PRODUCT_TILE, dtype=dtype, device=device)
    hopper_product(zeros[:1], zeros, None, _tile_counts(device), product_shape(1, PRODUCT_TILE, PRODUCT_TILE, 1))


@cache
def _tile_counts(device: torch.device) -> torch.Tensor:
    """One product runs at a time on a device: steps do, and the products of a step follow each other."""
    return torch.zeros(_TILES_MAX, dtype=torch.int32, device=device)
