"""Operators that stand for several of the catalogue, in one pass over their tensors."""

from collections.abc import Sequence
from typing import ClassVar

from sagellm.models.rope import Rope
from sagellm.runtime.execution_graph.operators import Operator, OperatorWork, check_heads, must_be
from sagellm.runtime.execution_graph.tensors import StepSizes, Tensor, TensorType, all_bytes


class AddRmsNorm(Operator, frozen=True):
    """Residual add, then RMS norm: (x, residual, weight) -> (norm of the sum, the sum)."""

    num_inputs: ClassVar = (3,)
    eps: float

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        x, residual, weight = inputs
        must_be("the residual", residual.shape, x.shape)
        must_be("the norm's weight", weight.shape, (x.width,))
        return (TensorType(x.shape, x.dtype), TensorType(x.shape, x.dtype))


class SiluMultiply(Operator, frozen=True):
    """silu(gate) * up of a joined projection: x [n, 2 * width], the gate's columns first -> [n, width]."""

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        if inputs[0].width % 2:
            raise ValueError(f"{inputs[0].name} has width {inputs[0].width}, must be even")
        return (TensorType((inputs[0].shape[0], inputs[0].width // 2), inputs[0].dtype),)


class RotaryKVWrite(Operator, frozen=True):
    """Rotates queries and keys, writes keys and values to the layer's cache: (q, k, v, positions) -> rotated q."""

    num_inputs: ClassVar = (4,)
    writes_kv: ClassVar = True
    head_dim: int
    rope: Rope

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        return _query_type(inputs, self.head_dim)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        return _rotary_write_work(inputs, outputs, sizes)


class HeadNormRotaryKVWrite(Operator, frozen=True):
    """As ``RotaryKVWrite``, with an RMS norm of each query and key head before.

    (q, k, v, positions, query weight [head_dim], key weight [head_dim]) -> rotated q.
    """

    num_inputs: ClassVar = (6,)
    writes_kv: ClassVar = True
    head_dim: int
    rope: Rope
    eps: float

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        for weight in inputs[4:]:
            must_be("the head norm's weight", weight.shape, (self.head_dim,))
        return _query_type(inputs, self.head_dim)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        work = _rotary_write_work(inputs[:4], outputs, sizes)
        return work._replace(weight_bytes=all_bytes(inputs[4:], sizes))


def _query_type(inputs: Sequence[Tensor], head_dim: int) -> tuple[TensorType, ...]:
    q, k, v, positions = inputs[:4]
    check_heads(q, head_dim)
    check_heads(k, head_dim)
    must_be("the values", v.shape, k.shape)
    must_be("the keys", k.shape, (q.shape[0], k.width))
    must_be("positions", positions.shape, q.shape[:1])
    return (TensorType(q.shape, q.dtype),)


def _rotary_write_work(inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
    q, k, v, _ = inputs
    return OperatorWork(
        flops=3 * (q.num_elements(sizes) + k.num_elements(sizes)),
        read_bytes=all_bytes(inputs, sizes),
        written_bytes=all_bytes(outputs, sizes),
        kv_written_bytes=k.num_bytes(sizes) + v.num_bytes(sizes),
    )
