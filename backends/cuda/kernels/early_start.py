"""Kernels launched while the one in front of them still runs (programmatic dependent launch, Hopper and later).

A multiprocessor that is through with one kernel then does not idle until all of them are: programs of the next one are
there already, and wait. Such a kernel's last constant is EARLY, and it calls `wait_for_kernel_before` first of all.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_HOPPER = (9, 0)


@triton.jit
def wait_for_kernel_before(EARLY: tl.constexpr):
    """Until all that was launched before has ended, and what it wrote can be read. The next kernel may come to wait."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@cache
def can_start_early(device_index: int) -> bool:
    """Whether the device knows of it; -1 is the CPU, which interprets kernels."""
    return device_index >= 0 and torch.cuda.get_device_capability(device_index) >= _HOPPER
