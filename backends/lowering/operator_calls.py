"""How each operator of the graph becomes a call of its kernel: the kernel's name, and what is bound to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, assert_never

import torch

from backends.operators.communicator import Communicator
from sagellm.runtime.execution_graph import expert_operators, fused_operators, operators
from sagellm.runtime.execution_graph.ir import AnyOperator


@dataclass(frozen=True, slots=True)
class OperatorCall:
    """``kernel(*activations, *weights, *constants, *step tensors, **attributes)``."""

    kernel: str
    constants: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankContext:
    """What calls take from the rank that they run on."""

    communicator: Communicator
    rotary_table: Callable[[Any, int], torch.Tensor]  # of a rope and a head size


def operator_call(operator: AnyOperator, weights: tuple[torch.Tensor, ...], rank: RankContext) -> OperatorCall:
    """The call for an operator whose node has these weights."""
    match operator:
        case operators.Embedding():
            first_row = operator.first_row - (rank.communicator.rank * weights[0].shape[0] if operator.sharded else 0)
            return OperatorCall("embedding", attributes={"first_row": first_row, "sharded": operator.sharded})
        case operators.RmsNorm():
            return OperatorCall("rms_norm", attributes={"epsilon": operator.eps})
        case operators.LayerNorm():
            return OperatorCall("layer_norm", attributes={"epsilon": operator.eps})
        case operators.HeadRmsNorm():
            return OperatorCall("head_rms_norm", attributes={"epsilon": operator.eps})
        case fused_operators.AddRmsNorm():
            return OperatorCall("add_rms_norm", attributes={"epsilon": operator.eps})
        case operators.Split():
            return OperatorCall("split", attributes={"widths": operator.widths})
        case expert_operators.RouteToExperts():
            number = operator.experts_per_token
            return OperatorCall("moe_router", attributes={"experts_per_token": number, "normalise": operator.normalise})
        case operators.AllReduce():
            return OperatorCall("all_reduce", (rank.communicator,))
        case operators.AllGather():
            return OperatorCall("all_gather", (rank.communicator,), {"width": operator.width})
        case operators.Attention():
            window = operator.sliding_window
            return OperatorCall("attention", attributes={"scale": operator.scale, "sliding_window": window})
        case operators.Rotary():
            return OperatorCall("rotary", (rank.rotary_table(operator.rope, operator.head_dim),))
        case fused_operators.RotaryKVWrite():
            return OperatorCall("rotary_kv_write", (rank.rotary_table(operator.rope, operator.head_dim),))
        case fused_operators.HeadNormRotaryKVWrite():
            table = rank.rotary_table(operator.rope, operator.head_dim)
            return OperatorCall("head_norm_rotary_kv_write", (table,), {"epsilon": operator.eps})
        case _:
            return OperatorCall(_plain_kernel(operator))


PlainOperator = (
    operators.Add
    | operators.AddBias
    | operators.KVSend
    | operators.KVWrite
    | operators.Linear
    | operators.Multiply
    | operators.Relu
    | operators.SelectRows
    | operators.Silu
    | fused_operators.SiluMultiply
    | expert_operators.Experts
)


def _plain_kernel(operator: PlainOperator) -> str:
    """Kernels of operators without attributes."""
    match operator:
        case operators.Linear():
            return "linear"
        case operators.Add():
            return "add"
        case operators.AddBias():
            return "add_bias"
        case operators.Multiply():
            return "multiply"
        case operators.Silu():
            return "silu"
        case operators.Relu():
            return "relu"
        case operators.SelectRows():
            return "select_rows"
        case operators.KVWrite():
            return "kv_write"
        case fused_operators.SiluMultiply():
            return "silu_multiply"
        case expert_operators.Experts():
            return "moe_experts"
        case operators.KVSend():
            return "kv_send"
        case _:
            assert_never(operator)
