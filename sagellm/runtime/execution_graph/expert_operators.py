"""Operators of mixture-of-experts layers."""

from collections.abc import Sequence
from typing import ClassVar

from sagellm.runtime.execution_graph.operators import Operator, OperatorWork, must_be
from sagellm.runtime.execution_graph.tensors import DTYPE_BYTES, StepSizes, Tensor, TensorType, all_bytes


class RouteToExperts(Operator, frozen=True):
    """Chooses experts: logits [n, experts] -> (expert ids [n, k] int64, their shares [n, k]).

    Softmax over all experts in float32, the k largest, and, with ``normalise``, shares that sum to one.
    """

    experts_per_token: int
    normalise: bool

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        if inputs[0].width < self.experts_per_token:
            raise ValueError(f"{self.experts_per_token} experts for each token, but there are {inputs[0].width}")
        shape = (inputs[0].shape[0], self.experts_per_token)
        return (TensorType(shape, "int64"), TensorType(shape, inputs[0].dtype))


class Experts(Operator, frozen=True):
    """Each token through its experts' gated MLPs, summed by their shares.

    (x [n, hidden], ids [n, k], shares [n, k], gate_up [experts, 2 * intermediate, hidden],
    down [experts, hidden, intermediate]) -> [n, hidden]. The gate's rows come before the up projection's:
    an expert gives down @ (silu(gate @ x) * (up @ x)).
    """

    num_inputs: ClassVar = (5,)

    def output_types(self, inputs: Sequence[Tensor]) -> tuple[TensorType, ...]:
        x, ids, shares, gate_up, down = inputs
        must_be("the shares", shares.shape, ids.shape)
        must_be("gate_up", gate_up.shape, (gate_up.shape[0], 2 * down.width, x.width))
        must_be("down", down.shape, (gate_up.shape[0], x.width, down.width))
        return (TensorType(x.shape, x.dtype),)

    def work(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> OperatorWork:
        """Counts the weights of as many experts as tokens routed evenly at random would touch on average."""
        x, ids, _, gate_up, down = inputs
        num_experts, expert_width, _ = gate_up.sizes_in(sizes)
        num_pairs = ids.num_elements(sizes)
        expert_bytes = (gate_up.num_bytes(sizes) + down.num_bytes(sizes)) // num_experts
        inner_bytes = self.workspace_bytes(inputs, outputs, sizes)
        return OperatorWork(
            flops=2 * num_pairs * x.width * (expert_width + down.width),
            weight_bytes=round(expert_bytes * experts_touched(num_experts, ids.width, sizes.num_tokens)),
            read_bytes=all_bytes(inputs[:3], sizes) + inner_bytes,
            written_bytes=outputs[0].num_bytes(sizes) + inner_bytes,
        )

    def workspace_bytes(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], sizes: StepSizes) -> int:
        """Of every pair of a token and its expert: what gate and up give, and their product."""
        x, ids, _, gate_up, down = inputs
        expert_width = gate_up.sizes_in(sizes)[1]
        return ids.num_elements(sizes) * (expert_width + down.width) * DTYPE_BYTES[x.dtype]


def experts_touched(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """How many experts at least one of ``num_tokens`` tokens goes to, on average, if each token's are drawn evenly."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** num_tokens)
