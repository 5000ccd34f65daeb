"""Random weights, for a model's speed without its checkpoint."""

import math
import zlib

import torch

from sagellm.runtime.execution_graph.tensors import WeightSource


class DummyWeights:
    """Random tensors in place of a checkpoint's, the same for a seed, a device and a tensor's name.

    Matrices are normal with a variance of one over their fan-in, so a projection keeps the size of what
    the norms, which are ones, give it; biases are small. How projections are fused, and among how many
    ranks they are divided, makes no difference to the values.
    """

    def __init__(self, device: torch.device | str, seed: int = 0) -> None:
        self._generator = torch.Generator(device)
        self._seed = seed

    def check(self, sources: dict[str, WeightSource]) -> None:
        """Any model will do."""

    def fill(self, target: torch.Tensor, source: WeightSource, dim: int, first: int, end: int) -> None:
        """Fill ``target`` with the range ``first : end`` of dimension ``dim`` of the random tensor."""
        # A CPU generator takes no more than 32 bits of its seed.
        self._generator.manual_seed(zlib.crc32(f"{self._seed} {source.name}".encode()))
        if len(source.shape) == 1 and not source.name.endswith(".bias"):
            target.fill_(1.0)
        elif end - first == source.shape[dim]:
            target.normal_(0.0, _deviation(source), generator=self._generator)
        else:
            whole = target.new_empty(source.shape)
            whole.normal_(0.0, _deviation(source), generator=self._generator)
            target.copy_(whole.narrow(dim, first, end - first))

    def close(self) -> None:
        """There is nothing to let go of."""


def _deviation(source: WeightSource) -> float:
    fan_in = source.shape[-1] if len(source.shape) > 1 else 2500  # biases: 0.02, small beside a projection's 1
    return 1.0 / math.sqrt(fan_in)
