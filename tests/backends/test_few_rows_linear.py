"""The kernel for products of few rows, interpreted on the CPU, against torch."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from backends.conformance.closeness import expect_close
from backends.cuda.kernels.few_rows_linear import LinearShape, few_rows_linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_rows", "num_parts"), [(0, 1), (1, 1), (5, 3), (33, 2), (7, 5)])
def test_product_of_strided_rows(num_rows: int, num_parts: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 768, generator=generator)[:, :640]
    weight = torch.randn(256, 640, generator=generator) / 640**0.5
    bias = torch.randn(256, generator=generator) if has_bias else None
    found = few_rows_linear(x, weight, bias, LinearShape(64, 128, num_parts, num_warps=4, num_stages=2))
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expect_close(found, exact, torch.float32, "product")
