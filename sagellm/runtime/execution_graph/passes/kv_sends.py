"""Hand-over of KV layer by layer, in graphs of prefill instances."""

import msgspec

from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import Attention, KVSend
from sagellm.runtime.execution_graph.tensors import DTYPE_BYTES


def add_kv_sends(graph: ExecutionGraph) -> ExecutionGraph:
    """After each layer's attention, a node that sends what the step wrote to the layer's cache.

    It needs only the write, so that a schedule may send a layer while later ones compute.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        operator = node.operator
        if isinstance(operator, Attention):
            dtype = graph.tensors_by_name[node.inputs[0]].dtype
            token_bytes = 2 * operator.num_kv_heads * operator.head_dim * DTYPE_BYTES[dtype]
            nodes.append(Node(f"{node.name}.kv_send", KVSend(token_bytes), (), (), node.layer))
    return msgspec.structs.replace(graph, nodes=tuple(nodes))
