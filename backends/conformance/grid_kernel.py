"""A Triton kernel for the check of launches on a grid."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def count_places(numbers, count, WIDTH: tl.constexpr):
    """Adds to each number the index of the program that it belongs to."""
    places = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = places < count
    tl.store(numbers + places, tl.load(numbers + places, mask=inside) + tl.program_id(0), mask=inside)
