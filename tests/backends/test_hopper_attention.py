"""The kernel for Hopper can be compiled where there is no such device; what it computes, conformance checks on one.

Compiling is a process of its own: tests beside this one have Triton interpret kernels, which cannot be undone.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends.cuda.kernels.tile_shapes import HOPPER_ROWS, HopperTiles, hopper_tiles

HEADS = 4
ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "short contexts": (hopper_tiles(1), 128, 7, 16),
    "long contexts": (hopper_tiles(100_000), 128, 2, 32),
    "small heads": (hopper_tiles(1), 64, 1, 8),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_compiles(case: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, case]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def compile_kernel(shape: HopperTiles, head_dim: int, group: int, block_size: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from backends.cuda.kernels import hopper_attention, shared_layouts

    kernel = hopper_attention._hopper_attention._kernel
    layout = shared_layouts.swizzled_layout()
    blocks = f"tensordesc<bf16[{block_size}, {shared_layouts.SWIZZLED.value}],{layout!r}>"
    types = {
        **dict.fromkeys(("query", "out"), "*bf16"),
        **dict.fromkeys(("key_cache", "value_cache"), blocks),
        **dict.fromkeys(("tiles", "num_tiles", "block_tables"), "*i32"),
        "scale": "fp32",
    }
    constants = (group, HOPPER_ROWS // group, HEADS, block_size, shape.num_keys, head_dim, shape.num_stages)
    names = kernel.arg_names
    capitals = [name for name in names if name.isupper()]
    signature = {name: "constexpr" if name in capitals else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in zip(capitals, constants, strict=True)}
    compiled = triton.compile(
        GluonASTSource(kernel, signature, places),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": hopper_attention.REGISTERS},
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 << 10


if __name__ == "__main__":
    compile_kernel(*CASES[sys.argv[1]])
