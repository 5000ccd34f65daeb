"""The kernel for products of few rows can be compiled where there is no Hopper, and leaves other products alone.

What it computes, conformance checks on a device. Compiling is a process of its own: tests beside this one have Triton
interpret kernels, which cannot be undone.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends.cuda.kernels.tile_shapes import PRODUCT_RUN, PRODUCT_TILE, ProductShape, product_shape

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "one row": (product_shape(1, 4608, 3584, 132), True),
    "32 rows": (product_shape(32, 3584, 18944, 132), False),
}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_compiles(case: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, case]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


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
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from backends.cuda.kernels import hopper_product, shared_layouts

    kernel = hopper_product._hopper_product._kernel
    layout = shared_layouts.swizzled_layout()
    columns = shared_layouts.SWIZZLED.value
    types = {
        **dict.fromkeys(("out", "bias"), "*bf16"),
        "x": f"tensordesc<bf16[{shape.num_rows}, {columns}],{layout!r}>",
        "weight": f"tensordesc<bf16[{PRODUCT_TILE}, {columns}],{layout!r}>",
        "parts": "*fp32",
        "counts": "*i32",
    }
    constants = (PRODUCT_TILE, shape.num_rows, PRODUCT_RUN, shape.num_stages, has_bias, True)
    names = kernel.arg_names
    capitals = [name for name in names if name.isupper()]
    signature = {name: "constexpr" if name in capitals else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in zip(capitals, constants, strict=True)}
    compiled = triton.compile(
        GluonASTSource(kernel, signature, places),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": hopper_product.REGISTERS},
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "griddepcontrol.wait" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 << 10


if __name__ == "__main__":
    compile_kernel(*CASES[sys.argv[1]])
