"""Selects the rows whose logits are wanted as early as can be, not just before the logits.

After its keys and values are in the cache, a prompt's last layer matters for one row only, or for none: all that comes
after, attention included, is computed for the sampled rows alone.
"""

import msgspec

from sagellm.runtime.execution_graph.expert_operators import Experts, RouteToExperts
from sagellm.runtime.execution_graph.fused_operators import AddRmsNorm, SiluMultiply
from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import (
    Add,
    AddBias,
    AllReduce,
    Attention,
    LayerNorm,
    Linear,
    Multiply,
    Relu,
    RmsNorm,
    SelectRows,
    Silu,
    Split,
)
from sagellm.runtime.execution_graph.tensors import Dim, Extent, Tensor

# What these give for a row depends on that row of their inputs alone.
_BY_ROW = (
    Add, AddBias, AddRmsNorm, AllReduce, Experts, LayerNorm, Linear, Multiply, Relu, RmsNorm, RouteToExperts, Silu,
    SiluMultiply, Split,
)  # fmt: skip


def select_rows_early(graph: ExecutionGraph) -> ExecutionGraph:
    """The graph with its one `SelectRows` moved before all that is computed for nothing else.

    Nodes for all rows come first, then selections, then what is computed for the selected rows. A graph in which there
    is nothing to move is given back as it is.
    """
    (selection,) = (node for node in graph.nodes if isinstance(node.operator, SelectRows))
    moved = _nodes_behind(graph, selection)
    if not moved:
        return graph
    moved_outputs = {output for node in moved.values() for output in node.outputs}
    weights = graph.weights_by_name
    selected = dict.fromkeys(
        name for node in moved.values() for name in node.inputs if name not in moved_outputs and name not in weights
    )
    new_names = {name: f"{name}.sampled" for name in selected}
    renamed = {**new_names, selection.outputs[0]: selection.inputs[0]}
    last = set(_followers(graph, selection)) | set(moved)
    body = [node for node in graph.nodes if node.name not in last and node is not selection]
    selections = [
        Node(f"{name}.sampled", SelectRows(), (name, selection.inputs[1]), (new_name,))
        for name, new_name in new_names.items()
    ]
    tail = [_on_sampled_rows(node, renamed) for node in graph.nodes if node.name in last]
    by_name = graph.tensors_by_name
    tensors = [_of_sampled(tensor) if tensor.name in moved_outputs else tensor for tensor in graph.tensors]
    added = [msgspec.structs.replace(_of_sampled(by_name[name]), name=new) for name, new in new_names.items()]
    kept = [tensor for tensor in tensors if tensor.name != selection.outputs[0]]
    return msgspec.structs.replace(graph, tensors=(*kept, *added), nodes=(*body, *selections, *tail))


def _nodes_behind(graph: ExecutionGraph, selection: Node) -> dict[str, Node]:
    """Nodes of whose outputs nobody needs other rows than the sampled ones."""
    moved: dict[str, Node] = {}
    for node in reversed(graph.nodes):
        consumers = [consumer for name in node.outputs for consumer in graph.consumers.get(name, ())]
        is_for_sampled_rows = all(consumer is selection or consumer.name in moved for consumer in consumers)
        is_inner = bool(consumers) and not set(node.outputs) & set(graph.outputs)
        if is_inner and is_for_sampled_rows and isinstance(node.operator, (*_BY_ROW, Attention)):
            moved[node.name] = node
    return moved


def _followers(graph: ExecutionGraph, node: Node) -> list[str]:
    """All nodes that need what ``node`` gives, directly or by way of others."""
    reached = set(node.outputs)
    found = []
    for other in graph.nodes:
        if reached & set(other.inputs):
            reached |= set(other.outputs)
            found.append(other.name)
    return found


def _on_sampled_rows(node: Node, renamed: dict[str, str]) -> Node:
    operator = node.operator
    if isinstance(operator, Attention):
        operator = msgspec.structs.replace(operator, of_sampled_rows=True)
    inputs = tuple(renamed.get(name, name) for name in node.inputs)
    return msgspec.structs.replace(node, operator=operator, inputs=inputs)


def _of_sampled(tensor: Tensor) -> Tensor:
    return msgspec.structs.replace(tensor, shape=tuple(map(_sampled_dim, tensor.shape)))


def _sampled_dim(dim: Dim) -> Dim:
    if isinstance(dim, int):
        return dim
    return Extent(num_seqs=dim.num_seqs, num_sampled=dim.num_sampled + dim.num_tokens, constant=dim.constant)
