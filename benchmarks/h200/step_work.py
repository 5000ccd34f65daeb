"""What a step has to read, write and compute, counted from its execution graph, and how long a card takes for it."""

from dataclasses import dataclass

from sagellm.runtime.execution_graph.expert_operators import Experts
from sagellm.runtime.execution_graph.fused_operators import (
    AddRmsNorm,
    HeadNormRotaryKVWrite,
    RotaryKVWrite,
    SiluMultiply,
)
from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import (
    Attention,
    Embedding,
    HeadRmsNorm,
    KVWrite,
    LayerNorm,
    Linear,
    Multiply,
    Relu,
    RmsNorm,
    Rotary,
    SelectRows,
    Silu,
    Split,
)
from sagellm.runtime.execution_graph.tensors import StepSizes

PEAK_BYTES_PER_S = 4.3e12
"""Of a copy on an H200, read and written bytes together."""
PEAK_FLOPS_PER_S = 790e12
"""Of bf16 products on an H200."""

HEAD = "head"
DRAWING = "drawing"
_KINDS: dict[type, str] = {
    Linear: "linear",
    Experts: "experts",
    Attention: "attention",
    AddRmsNorm: "norms",
    RmsNorm: "norms",
    LayerNorm: "norms",
    HeadRmsNorm: "norms",
    RotaryKVWrite: "rotary and KV write",
    HeadNormRotaryKVWrite: "rotary and KV write",
    Rotary: "rotary and KV write",
    KVWrite: "rotary and KV write",
    SiluMultiply: "activation",
    Silu: "activation",
    Relu: "activation",
    Multiply: "activation",
    Embedding: "embedding and rows",
    SelectRows: "embedding and rows",
    Split: "embedding and rows",
}
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that go to or from memory, of which the needed ones no fusion can save, and FLOPs.

    Needed are weights and KV; activations could stay in caches. ``floor_s`` is the time of a card that does
    either at its full rate, both at once; ``operators_s`` of one that does so for each operator, one after the other.
    """

    num_bytes: int = 0
    num_needed_bytes: int = 0
    num_flops: int = 0
    operators_s: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.num_bytes + other.num_bytes,
            self.num_needed_bytes + other.num_needed_bytes,
            self.num_flops + other.num_flops,
            self.operators_s + other.operators_s,
        )

    @property
    def floor_s(self) -> float:
        return limit_s(self.num_needed_bytes, self.num_flops)


def limit_s(num_bytes: int, num_flops: int) -> float:
    """The longer of what memory and what arithmetic take at least."""
    return max(num_bytes / PEAK_BYTES_PER_S, num_flops / PEAK_FLOPS_PER_S)


def work_by_kind(graph: ExecutionGraph, sizes: StepSizes) -> dict[str, Work]:
    """Of all nodes, by what they do; drawing reads the logits once."""
    found: dict[str, Work] = {}
    for node in graph.nodes:
        kind = kind_of(graph, node)
        found[kind] = found.get(kind, Work()) + _work(graph, node, sizes)
    logits_bytes = 4 * graph.tensors_by_name[graph.outputs[0]].num_elements(sizes)
    found[DRAWING] = Work(logits_bytes, 0, 0, limit_s(logits_bytes, 0))
    return found


def kind_of(graph: ExecutionGraph, node: Node) -> str:
    if isinstance(node.operator, Linear) and graph.outputs[0] in node.outputs:
        return HEAD
    return _KINDS.get(type(node.operator), OTHER)


def _work(graph: ExecutionGraph, node: Node, sizes: StepSizes) -> Work:
    if node.operator.is_view:
        return Work()
    work = graph.work(node, sizes)
    needed = work.weight_bytes + work.kv_read_bytes + work.kv_written_bytes
    return Work(work.memory_bytes, needed, work.flops, limit_s(work.memory_bytes, work.flops))
