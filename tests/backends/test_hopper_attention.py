"""The kernel for Hopper can be compiled where there is no such device; what it computes, conformance checks on one.

Compiling is a process of its own: tests beside this one have Triton interpret kernels, which cannot be undone.
"""

import importlib.util
import sys

import pytest
from hopper_compiler import ptx_for_hopper, run_alone

from backends.cuda.kernels.tile_shapes import HOPPER_ROWS, HopperTiles, hopper_tiles

HEADS = 4
CASES = {
    "short contexts": (hopper_tiles(1), 128, 7, 16),
    "long contexts": (hopper_tiles(100_000), 128, 2, 32),
    "small heads": (hopper_tiles(1), 64, 1, 8),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_compiles(case: str) -> None:
    run_alone(__file__, case)


def compile_kernel(shape: HopperTiles, head_dim: int, group: int, block_size: int) -> None:
    from backends.cuda.kernels import hopper_attention, shared_layouts

    blocks = f"tensordesc<bf16[{block_size}, {shared_layouts.SWIZZLED.value}],{shared_layouts.swizzled_layout()!r}>"
    types = {
        **dict.fromkeys(("query", "out"), "*bf16"),
        **dict.fromkeys(("key_cache", "value_cache"), blocks),
        **dict.fromkeys(("tiles", "num_tiles", "block_tables"), "*i32"),
        "scale": "fp32",
    }
    constants = (group, HOPPER_ROWS // group, HEADS, block_size, shape.num_keys, head_dim, shape.num_stages)
    kernel = hopper_attention._hopper_attention._kernel
    assert "wgmma.mma_async" in ptx_for_hopper(kernel, types, constants, hopper_attention.REGISTERS)


if __name__ == "__main__":
    compile_kernel(*CASES[sys.argv[1]])
