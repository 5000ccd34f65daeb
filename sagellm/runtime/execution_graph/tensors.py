"""Tensors of an execution graph: shapes that depend on the step, types, and where weights come from."""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4}


class StepSizes(NamedTuple):
    """What a step's shapes and work depend on."""

    num_tokens: int = 0
    num_seqs: int = 0
    num_sampled: int = 0  # rows whose logits are wanted
    num_context_tokens: int = 0  # KV tokens that attention reads, each sequence's context counted once
    num_token_pairs: int = 0  # query-key pairs that attention works on, summed over queries


class Extent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A size that differs from step to step: a linear expression with integer coefficients."""

    num_tokens: int = 0
    num_seqs: int = 0
    num_sampled: int = 0
    constant: int = 0

    def __str__(self) -> str:
        factors = (("num_tokens", self.num_tokens), ("num_seqs", self.num_seqs), ("num_sampled", self.num_sampled))
        terms = [name if factor == 1 else f"{factor} {name}" for name, factor in factors if factor]
        return " + ".join([*terms, str(self.constant)] if self.constant or not terms else terms)

    def value(self, sizes: StepSizes) -> int:
        return (
            self.num_tokens * sizes.num_tokens
            + self.num_seqs * sizes.num_seqs
            + self.num_sampled * sizes.num_sampled
            + self.constant
        )

    def times(self, factor: int) -> "Extent":
        return Extent(
            self.num_tokens * factor, self.num_seqs * factor, self.num_sampled * factor, self.constant * factor
        )


NUM_TOKENS = Extent(num_tokens=1)
NUM_SEQS = Extent(num_seqs=1)
NUM_SAMPLED = Extent(num_sampled=1)

Dim = int | Extent
Shape = tuple[Dim, ...]
TensorKind = Literal["input", "activation", "weight"]


class TensorType(NamedTuple):
    """What an operator's shape rule says of one of its outputs."""

    shape: Shape
    dtype: str


class Tensor(msgspec.Struct, frozen=True):
    """One tensor on one rank. ``kind`` says who provides it: the step, an operator, or the model."""

    name: str
    shape: Shape
    dtype: str
    kind: TensorKind

    def sizes_in(self, sizes: StepSizes) -> tuple[int, ...]:
        """The shape in numbers."""
        return tuple(dim if isinstance(dim, int) else dim.value(sizes) for dim in self.shape)

    def num_elements(self, sizes: StepSizes) -> int:
        return prod(self.sizes_in(sizes))

    def num_bytes(self, sizes: StepSizes) -> int:
        return self.num_elements(sizes) * DTYPE_BYTES[self.dtype]

    @property
    def width(self) -> int:
        """The last dimension. Raises ``ValueError`` where that differs from step to step."""
        width = self.shape[-1] if self.shape else None
        if not isinstance(width, int):
            raise ValueError(f"tensor {self.name}: its last dimension is {width}, must be a number")
        return width


class Shard(msgspec.Struct, frozen=True):
    """Which part of a checkpoint tensor a rank holds: one of ``num_parts`` equal parts along ``dim``.

    With fewer parts than ranks (key-value heads), neighbouring ranks hold the same part. Parts are
    rounded up where the size does not divide, so the last may be short; it is filled up with zeros.
    """

    dim: int
    num_parts: int


class WeightSource(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tensor of the checkpoint that a weight is made from. ``shard`` is None where every rank holds all of it."""

    name: str
    shape: tuple[int, ...]  # in the checkpoint
    shard: Shard | None = None

    @property
    def rank_shape(self) -> tuple[int, ...]:
        """The shape of a rank's part, zeros that fill it up included."""
        if self.shard is None:
            return self.shape
        size = -(-self.shape[self.shard.dim] // self.shard.num_parts)
        return (*self.shape[: self.shard.dim], size, *self.shape[self.shard.dim + 1 :])

    def range_of(self, rank: int, tp: int) -> tuple[int, int, int]:
        """(dimension, first, end) of what rank ``rank`` of ``tp`` takes of the checkpoint's tensor."""
        if self.shard is None:
            return 0, 0, self.shape[0]
        size = self.rank_shape[self.shard.dim]
        first = (rank * self.shard.num_parts // tp) * size
        whole = self.shape[self.shard.dim]
        return self.shard.dim, min(first, whole), min(first + size, whole)


class WeightSpec(msgspec.Struct, frozen=True):
    """How a rank makes one weight: its parts of the sources, joined along dimension 0, viewed as ``shape``."""

    name: str  # of the graph's tensor
    shape: tuple[int, ...]  # on one rank
    sources: tuple[WeightSource, ...]


def all_bytes(tensors: Sequence[Tensor], sizes: StepSizes) -> int:
    return sum(tensor.num_bytes(sizes) for tensor in tensors)
