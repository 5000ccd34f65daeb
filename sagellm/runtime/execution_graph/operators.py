"""The catalogue of operators: what each computes, its shape rule, and its work.

An operator is its attributes; its tensors are the node's. Activations have two dimensions, rows (tokens)
and a width; all heads lie side by side in the width. Linear weights are [num_outputs, num_inputs].

The paged KV cache and what addresses it (slots, block tables, where each sequence's rows begin) are not
tensors of the graph. They come with the step, and the operators that say so use them for their node's layer.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import msgspec

from sagellm.models.rope import Rope
from sagellm.runtime.execution_graph.tensors import DTYPE_BYTES, Shape, StepSizes, Tensor, TensorType, all_bytes


class OperatorWork(NamedTuple):
    """What one operator does in one step on one rank. A multiply and an add count as two operations."""

    flops: int = 0
    weight_bytes: int = 0  # weights read
    read_bytes: int = 0  # activations and inputs read
    written_bytes: int = 0
    kv_read_bytes: int = 0
    kv_written_bytes: int = 0
    communicated_bytes: int = 0  # this rank's tensor that a collective reduces or gathers, or that is sent

    @property
    def memory_bytes(self) -> int:
        """All that goes to and from this rank's memory."""
        return self.weight_bytes + self.read_bytes + self.written_bytes + self.kv_read_bytes + self.kv_written_bytes


class Operator(msgspec.Struct, frozen=True, tag=True):
    """What operators have in common: they read their inputs once, write their outputs once, and do little else."""

    num_inputs: ClassVar[tuple[int, ...]] = (1,)  # numbers of inputs that are allowed
    reads_kv: ClassVar[bool] = False  # of the node's layer; after every operator that writes it
    writes_kv: ClassVar[bool] = False
    is_collective: ClassVar[bool] = False  # all ranks take part, in the same order
    is_view: ClassVar[bool] = False  # outputs lie in the memory of the first input

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        """Shapes and types of the outputs. Raises ``ValueError`` where the inputs' shapes do not fit."""
        return (TensorType(inputs[0].shape, inputs[0].dtype),)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        return OperatorWork(
            flops=sum(tensor.num_elements(sizes) for tensor in outputs),
            weight_bytes=all_bytes([tensor for tensor in inputs if tensor.kind == "weight"], sizes),
            read_bytes=all_bytes([tensor for tensor in inputs if tensor.kind != "weight"], sizes),
            written_bytes=all_bytes(outputs, sizes),
        )

    def workspace_bytes(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> int:
        """Memory that is needed only while the operator runs, beside its inputs and outputs."""
        return 0


def must_be(what: str, shape: Shape, wanted: Shape) -> None:
    """Raises ``ValueError`` where a shape is not the wanted one."""
    if shape != wanted:
        raise ValueError(f"{what} has shape {shape_text(shape)}, must be {shape_text(wanted)}")


def shape_text(shape: Shape) -> str:
    return "[" + ", ".join(str(dim) for dim in shape) + "]"


class Embedding(Operator, frozen=True):
    """Rows of a table: (ids [n], table [rows, width]) -> [n, width].

    Row ``id + first_row`` of the table. With ``sharded``, rank r holds rows from ``r * rows`` on, and
    gives zeros for ids of which another rank holds the row.
    """

    num_inputs: ClassVar = (2,)
    sharded: bool = False
    first_row: int = 0

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        ids, table = inputs
        return (TensorType((*ids.shape, table.width), table.dtype),)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        row_bytes = outputs[0].num_bytes(sizes)
        return OperatorWork(weight_bytes=row_bytes, read_bytes=inputs[0].num_bytes(sizes), written_bytes=row_bytes)


class RmsNorm(Operator, frozen=True):
    """x / sqrt(mean(x^2) + eps) * weight over the width, in float32: (x, weight [width]).

    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """

    num_inputs: ClassVar = (2,)
    eps: float

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        must_be("the norm's weight", inputs[1].shape, (inputs[0].width,))
        return (TensorType(inputs[0].shape, inputs[0].dtype),)


class LayerNorm(Operator, frozen=True):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the width: (x, weight [width], bias [width])."""

    num_inputs: ClassVar = (3,)
    eps: float

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        for tensor in inputs[1:]:
            must_be(f"the norm's {tensor.name}", tensor.shape, (inputs[0].width,))
        return (TensorType(inputs[0].shape, inputs[0].dtype),)


class HeadRmsNorm(Operator, frozen=True):
    """An RMS norm of each head by itself: (x [n, heads * head_dim], weight [head_dim])."""

    num_inputs: ClassVar = (2,)
    head_dim: int
    eps: float

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        must_be("the head norm's weight", inputs[1].shape, (self.head_dim,))
        check_heads(inputs[0], self.head_dim)
        return (TensorType(inputs[0].shape, inputs[0].dtype),)


class Linear(Operator, frozen=True):
    """x @ weight.T (+ bias): (x [n, inputs], weight [outputs, inputs], bias [outputs] or none) -> [n, outputs]."""

    num_inputs: ClassVar = (2, 3)

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        x, weight = inputs[:2]
        must_be("the weight", weight.shape, (weight.shape[0], x.width))
        for bias in inputs[2:]:
            must_be("the bias", bias.shape, weight.shape[:1])
        return (TensorType((*x.shape[:-1], weight.shape[0]), x.dtype),)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        flops = 2 * outputs[0].num_elements(sizes) * inputs[0].width
        return Operator.work(self, inputs, outputs, sizes)._replace(flops=flops)


class AddBias(Operator, frozen=True):
    """x + bias for every row: (x [n, width], bias [width]). A sum over ranks gets its bias once, after it."""

    num_inputs: ClassVar = (2,)

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        must_be("the bias", inputs[1].shape, (inputs[0].width,))
        return (TensorType(inputs[0].shape, inputs[0].dtype),)


class Rotary(Operator, frozen=True):
    """Rotary position embedding of every head: (x [n, heads * head_dim], positions [n]).

    Element i of a head is rotated with element i + head_dim / 2, by position x frequency i. Su et al.,
    RoFormer, 2021, in the half-split layout of Hugging Face checkpoints.
    """

    num_inputs: ClassVar = (2,)
    head_dim: int
    rope: Rope

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        check_heads(inputs[0], self.head_dim)
        must_be("positions", inputs[1].shape, inputs[0].shape[:1])
        return (TensorType(inputs[0].shape, inputs[0].dtype),)


class KVWrite(Operator, frozen=True):
    """Puts keys and values into the layer's cache at the step's slots: (k, v [n, kv_heads * head_dim]) -> nothing."""

    num_inputs: ClassVar = (2,)
    writes_kv: ClassVar = True

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        must_be("the values", inputs[1].shape, inputs[0].shape)
        return ()

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        num_bytes = all_bytes(inputs, sizes)
        return OperatorWork(read_bytes=num_bytes, kv_written_bytes=num_bytes)


class Attention(Operator, frozen=True):
    """Causal attention over the layer's paged cache: q [n, num_heads * head_dim] -> the same shape.

    Row i of a sequence sees keys up to its own position, at most the last ``sliding_window`` of them
    (itself included) where that is not 0. Heads share key-value heads in groups of neighbours. Numbers
    of heads are one rank's. With ``of_sampled_rows`` queries are those of the step's sampled rows alone.
    """

    reads_kv: ClassVar = True
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int = 0
    of_sampled_rows: bool = False

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        must_be("the queries", inputs[0].shape, (inputs[0].shape[0], self.num_heads * self.head_dim))
        return (TensorType(inputs[0].shape, inputs[0].dtype),)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        """A sliding window is not taken off: sizes say what is read, whoever counted them."""
        token_bytes = 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[inputs[0].dtype]
        # A sampled row is its sequence's last, which sees all of the context.
        num_pairs = sizes.num_context_tokens if self.of_sampled_rows else sizes.num_token_pairs
        return OperatorWork(
            flops=4 * self.num_heads * self.head_dim * num_pairs,
            read_bytes=inputs[0].num_bytes(sizes),
            written_bytes=outputs[0].num_bytes(sizes),
            kv_read_bytes=token_bytes * sizes.num_context_tokens,
        )


class Add(Operator, frozen=True):
    """x + y, of one shape."""

    num_inputs: ClassVar = (2,)

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        must_be("the second summand", inputs[1].shape, inputs[0].shape)
        return (TensorType(inputs[0].shape, inputs[0].dtype),)


class Multiply(Operator, frozen=True):
    """x * y, of one shape."""

    num_inputs: ClassVar = (2,)

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        must_be("the second factor", inputs[1].shape, inputs[0].shape)
        return (TensorType(inputs[0].shape, inputs[0].dtype),)


class Silu(Operator, frozen=True):
    """x / (1 + exp(-x))."""


class Relu(Operator, frozen=True):
    """max(x, 0)."""


class Split(Operator, frozen=True):
    """Parts of the width, as views: x [n, sum of widths] -> [n, width] for each of ``widths``."""

    is_view: ClassVar = True
    widths: tuple[int, ...]

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        must_be("what is split", inputs[0].shape, (inputs[0].shape[0], sum(self.widths)))
        return tuple(TensorType((inputs[0].shape[0], width), inputs[0].dtype) for width in self.widths)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        return OperatorWork()


class SelectRows(Operator, frozen=True):
    """Some rows: (x [n, width], row numbers [m]) -> [m, width]."""

    num_inputs: ClassVar = (2,)

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        return (TensorType((*inputs[1].shape, *inputs[0].shape[1:]), inputs[0].dtype),)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        num_bytes = outputs[0].num_bytes(sizes)
        return OperatorWork(read_bytes=num_bytes + inputs[1].num_bytes(sizes), written_bytes=num_bytes)


class AllReduce(Operator, frozen=True):
    """The sum over all ranks, on every rank."""

    is_collective: ClassVar = True

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        return OperatorWork(communicated_bytes=inputs[0].num_bytes(sizes))


class AllGather(Operator, frozen=True):
    """All ranks' columns side by side, in the order of ranks, cut to ``width``: x [n, columns] -> [n, width]."""

    is_collective: ClassVar = True
    width: int

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        return (TensorType((inputs[0].shape[0], self.width), inputs[0].dtype),)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        return OperatorWork(communicated_bytes=inputs[0].num_bytes(sizes))


class KVSend(Operator, frozen=True):
    """Hands the KV that this step wrote in the layer to whoever goes on with the requests. No tensors."""

    num_inputs: ClassVar = (0,)
    reads_kv: ClassVar = True
    token_bytes: int  # of one token in one layer

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        return ()

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        num_bytes = self.token_bytes * sizes.num_tokens
        return OperatorWork(kv_read_bytes=num_bytes, communicated_bytes=num_bytes)


def check_heads(tensor: Tensor, head_dim: int) -> None:
    """Raises ``ValueError`` where a tensor's width is not made of heads."""
    if tensor.width % head_dim:
        raise ValueError(f"{tensor.name} has width {tensor.width}, must be a multiple of the head size {head_dim}")
