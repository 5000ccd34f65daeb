"""How the ranks of one tensor-parallel group exchange activations."""

import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Communicator(Protocol):
    """One rank's end of its group. Every rank makes the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The sum over ranks. The argument may be overwritten."""

    def all_gather(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The ranks' tensors side by side in the last dimension, in the order of ranks."""


class SingleRank:
    """A group of one: nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: "torch.Tensor") -> "torch.Tensor":
        return tensor

    def all_gather(self, tensor: "torch.Tensor") -> "torch.Tensor":
        return tensor


class DistributedRank:
    """A rank of a ``torch.distributed`` process group, whatever library carries it (NCCL, HCCL, gloo, ...)."""

    def __init__(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        import torch.distributed

        self._distributed = torch.distributed
        self._group = group
        self.rank = torch.distributed.get_rank(group)
        self.size = torch.distributed.get_world_size(group)

    def all_reduce(self, tensor: "torch.Tensor") -> "torch.Tensor":
        self._distributed.all_reduce(tensor, group=self._group)
        return tensor

    def all_gather(self, tensor: "torch.Tensor") -> "torch.Tensor":
        parts = [tensor.new_empty(tensor.shape) for _ in range(self.size)]
        self._distributed.all_gather(parts, tensor.contiguous(), group=self._group)
        return _side_by_side(parts)


class ThreadGroup:
    """A group whose ranks are threads of one process, each with a device of its own or all on one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[torch.Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size)

    def rank(self, rank: int) -> "ThreadRank":
        return ThreadRank(self, rank)


class ThreadRank:
    """One thread's end of a ``ThreadGroup``."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size

    def all_reduce(self, tensor: "torch.Tensor") -> "torch.Tensor":
        parts = self._exchange(tensor)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def all_gather(self, tensor: "torch.Tensor") -> "torch.Tensor":
        return _side_by_side(self._exchange(tensor))

    def _exchange(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        """Every rank's tensor, on this rank's device; returns when all ranks have read."""
        group = self._group
        group.parts[self.rank] = tensor
        group.barrier.wait()
        parts = [part.to(tensor.device, copy=True) for part in group.parts if part is not None]
        group.barrier.wait()
        return parts


def _side_by_side(parts: "list[torch.Tensor]") -> "torch.Tensor":
    import torch

    return torch.cat(parts, dim=-1)
