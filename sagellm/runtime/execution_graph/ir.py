"""The execution graph: nodes in an order in which they may run, and the tensors between them."""

from collections.abc import Iterable
from functools import cached_property
from typing import Literal

import msgspec

from sagellm.runtime.execution_graph.expert_operators import Experts, RouteToExperts
from sagellm.runtime.execution_graph.fused_operators import (
    AddRmsNorm,
    HeadNormRotaryKVWrite,
    RotaryKVWrite,
    SiluMultiply,
)
from sagellm.runtime.execution_graph.operators import (
    Add,
    AddBias,
    AllGather,
    AllReduce,
    Attention,
    Embedding,
    HeadRmsNorm,
    KVSend,
    KVWrite,
    LayerNorm,
    Linear,
    Multiply,
    OperatorWork,
    Relu,
    RmsNorm,
    Rotary,
    SelectRows,
    Silu,
    Split,
)
from sagellm.runtime.execution_graph.tensors import StepSizes, Tensor, WeightSpec

AnyOperator = (
    Add
    | AddBias
    | AddRmsNorm
    | AllGather
    | AllReduce
    | Attention
    | Embedding
    | Experts
    | HeadNormRotaryKVWrite
    | HeadRmsNorm
    | KVSend
    | KVWrite
    | LayerNorm
    | Linear
    | Multiply
    | Relu
    | RmsNorm
    | Rotary
    | RotaryKVWrite
    | RouteToExperts
    | SelectRows
    | Silu
    | SiluMultiply
    | Split
)

Stream = Literal["compute", "collective", "kv_send"]


class Node(msgspec.Struct, frozen=True, omit_defaults=True):
    """One operator at work. ``inputs`` and ``outputs`` are names of tensors, in the operator's order."""

    name: str
    operator: AnyOperator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: int | None = None  # whose KV cache it uses; None outside of the layers
    stream: Stream = "compute"


class Edge(msgspec.Struct, frozen=True):
    """``before`` must be over when ``after`` begins. ``via`` is a tensor's name, or ``kv`` for the layer's cache."""

    before: str
    after: str
    via: str
    kind: Literal["data", "kv"]


class ExecutionGraph(msgspec.Struct, frozen=True, dict=True):
    """One forward pass on one rank of ``tp``; all ranks run the same graph on their own parts of the weights.

    Running the nodes one after the other, in the order of ``nodes``, is right. So is every other order
    that keeps ``edges`` and, on all ranks alike, the order of collectives.
    """

    model: str
    num_layers: int
    tp: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    weights: tuple[WeightSpec, ...]
    nodes: tuple[Node, ...]

    @cached_property
    def tensors_by_name(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def weights_by_name(self) -> dict[str, WeightSpec]:
        return {spec.name: spec for spec in self.weights}

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that writes each activation."""
        return {output: node for node in self.nodes for output in node.outputs}

    @cached_property
    def consumers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each tensor, in order; tensors that nobody reads are missing."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """What must come before what: by tensors, and by the KV cache of a layer."""
        return (*_data_edges(self), *_kv_edges(self))

    def tensors_of(self, names: Iterable[str]) -> tuple[Tensor, ...]:
        by_name = self.tensors_by_name
        return tuple(by_name[name] for name in names)

    def work(self, node: Node, sizes: StepSizes) -> OperatorWork:
        """What ``node`` does in a step of these sizes."""
        return node.operator.work(self.tensors_of(node.inputs), self.tensors_of(node.outputs), sizes)


def _data_edges(graph: ExecutionGraph) -> Iterable[Edge]:
    for node in graph.nodes:
        for name in dict.fromkeys(node.inputs):
            producer = graph.producers.get(name)
            if producer is not None:
                yield Edge(producer.name, node.name, name, "data")


def _kv_edges(graph: ExecutionGraph) -> Iterable[Edge]:
    """A layer's cache is written before it is read."""
    writers: dict[int | None, list[Node]] = {}
    for node in graph.nodes:
        if node.operator.writes_kv:
            writers.setdefault(node.layer, []).append(node)
    for node in graph.nodes:
        if node.operator.reads_kv:
            for writer in writers.get(node.layer, ()):
                yield Edge(writer.name, node.name, "kv", "kv")


def to_json(graph: ExecutionGraph) -> bytes:
    return msgspec.json.encode(graph)


def from_json(data: bytes) -> ExecutionGraph:
    """Raises ``ValueError`` where ``data`` is no graph; it is not validated, see ``validate``."""
    try:
        return msgspec.json.decode(data, type=ExecutionGraph)
    except msgspec.DecodeError as error:
        raise ValueError(f"not an execution graph: {error}") from error
