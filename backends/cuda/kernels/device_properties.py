"""What kernels are chosen by. A CPU, which interprets kernels, has one multiprocessor and no compute capability."""

from functools import cache

import torch

HOPPER = 9  # major compute capability


@cache
def compute_capability(device: torch.device) -> int:
    """The major one; 0 of a CPU."""
    return 0 if device.type == "cpu" else torch.cuda.get_device_properties(device).major


@cache
def num_compute_units(device: torch.device) -> int:
    """Multiprocessors."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
