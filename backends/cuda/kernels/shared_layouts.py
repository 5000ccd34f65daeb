"""How tiles lie in shared memory for the tensor memory accelerator and the tensor cores of Hopper."""

from functools import cache
from typing import Any

from triton.experimental.gluon import language as gl

SWIZZLED = gl.constexpr(64)  # columns of 16 bits that lie side by side


@cache
def swizzled_layout() -> Any:
    """Of tiles SWIZZLED wide. Making one takes as long as launching a kernel."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
