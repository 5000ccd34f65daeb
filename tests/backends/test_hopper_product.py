"""The kernel for products of few rows can be compiled where there is no Hopper, and leaves other products alone.

What it computes, conformance checks on a device. Compiling is a process of its own: tests beside this one have Triton
interpret kernels, which cannot be undone.
"""

import importlib.util
import sys

import pytest
import torch
from hopper_compiler import ptx_for_hopper, run_alone

from backends.cuda.kernels.tile_shapes import PRODUCT_RUN, PRODUCT_TILE, ProductShape, product_shape

CASES = {
    "one row": (product_shape(1, 4608, 3584, 132), True),
    "32 rows": (product_shape(32, 3584, 18944, 132), False),
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_compiles(case: str) -> None:
    run_alone(__file__, case)


def test_where_the_kernel_fails_another_multiplies_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from backends.cuda.kernels import products

    # This device is no such one, as its compiler finds out.
    monkeypatch.setattr(products, "compute_capability", lambda device: 9)
    monkeypatch.setattr(products, "_WEIGHT_BYTES_MIN", 0)
    products._takes_hopper.cache_clear()
    x, weight = torch.randn(3, 64).half(), torch.randn(24, 64).half()
    for _ in range(2):
        assert torch.equal(products.product(x, weight, None), torch.nn.functional.linear(x, weight))
    products._takes_hopper.cache_clear()
    (record,) = caplog.records
    assert "slower kernels" in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(33, 64).half(), torch.zeros(8, 64).half()),
        (torch.zeros(0, 64).half(), torch.zeros(8, 64).half()),
        (torch.zeros(3, 64), torch.zeros(8, 64)),
        (torch.zeros(3, 64).half(), torch.zeros(8, 64).bfloat16()),
        (torch.zeros(3, 128).half()[:, ::2], torch.zeros(8, 64).half()),
        (torch.zeros(3, 64).half(), torch.zeros(64, 8).half().t()),
        (torch.zeros(3, 60).half(), torch.zeros(8, 60).half()),
    ],
    ids=("many rows", "no rows", "float32", "two types", "strided", "transposed", "rows of 120 bytes"),
)
def test_products_that_it_does_not_know(x: torch.Tensor, weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.cuda.kernels import products

    monkeypatch.setattr(products, "_WEIGHT_BYTES_MIN", 0)
    assert not products._has_few_rows(x, weight)
    assert products._has_few_rows(torch.zeros(3, 64).half(), torch.zeros(8, 64).half())


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "has_bias"),
    [(32, 24, False), (33, 24, True), (176, 64, True), (177, 24, False), (40, 65, False)],
)
def test_a_bias_of_zeros_changes_nothing_and_is_for_wide_weights_and_some_tens_of_rows(
    num_rows: int, num_columns: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends.cuda.kernels import products

    monkeypatch.setattr(products, "compute_capability", lambda device: 9)
    x, weight = torch.randn(num_rows, 64).half(), torch.randn(num_columns, 64).half()
    assert products._is_faster_with_bias(x, weight) is has_bias
    found, exact = products.product(x, weight, None), x.float() @ weight.float().t()
    assert (found.float() - exact).abs().max() < 0.02 * exact.abs().max()


def compile_kernel(shape: ProductShape, has_bias: bool) -> None:
    from backends.cuda.kernels import hopper_product, shared_layouts

    width, layout = shared_layouts.SWIZZLED.value, shared_layouts.swizzled_layout()
    types = {
        **dict.fromkeys(("out", "bias"), "*bf16"),
        "x": f"tensordesc<bf16[{shape.num_rows}, {width}],{layout!r}>",
        "weight": f"tensordesc<bf16[{PRODUCT_TILE}, {width}],{layout!r}>",
        "parts": "*fp32",
        "counts": "*i32",
    }
    constants = (PRODUCT_TILE, shape.num_rows, PRODUCT_RUN, shape.num_stages, has_bias, True)
    kernel = hopper_product._hopper_product._kernel
    ptx = ptx_for_hopper(kernel, types, constants, hopper_product.REGISTERS)
    assert "wgmma.mma_async" in ptx
    assert "griddepcontrol.wait" in ptx


if __name__ == "__main__":
    compile_kernel(*CASES[sys.argv[1]])
