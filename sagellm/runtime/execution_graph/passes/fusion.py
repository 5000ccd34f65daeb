"""Operators that are joined into one: fewer launches, and fewer passes over the same tensors.

Each function takes a graph and gives one of equal meaning. What would make a cycle is left as it was.
"""

from sagellm.runtime.execution_graph.fused_operators import (
    AddRmsNorm,
    HeadNormRotaryKVWrite,
    RotaryKVWrite,
    SiluMultiply,
)
from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import Add, HeadRmsNorm, KVWrite, Multiply, RmsNorm, Rotary, Silu, Split
from sagellm.runtime.execution_graph.passes.joined_projections import join_projections
from sagellm.runtime.execution_graph.rewriting import Replacement, only_consumer, replace_all


def fuse(graph: ExecutionGraph) -> ExecutionGraph:
    """What common engines join: projections of one input, and the four fusions of streaming operators."""
    for fusion in (join_projections, fuse_silu_multiply, fuse_add_norm, fuse_rotary_kv_write):
        graph = fusion(graph)
    return graph


def fuse_silu_multiply(graph: ExecutionGraph) -> ExecutionGraph:
    """silu(gate) * up of a joined projection, in one operator. Projections must have been joined before."""
    found = [_silu_multiply(graph, node) for node in graph.nodes if isinstance(node.operator, Multiply)]
    return replace_all(graph, [replacement for replacement in found if replacement])


def _silu_multiply(graph: ExecutionGraph, multiply: Node) -> Replacement | None:
    for activated, up in (multiply.inputs, multiply.inputs[::-1]):
        silu, split = graph.producers.get(activated), graph.producers.get(up)
        if (
            silu is None
            or split is None
            or not isinstance(silu.operator, Silu)
            or not isinstance(split.operator, Split)
        ):
            continue
        inner = (activated, *split.outputs)
        if split.outputs == (silu.inputs[0], up) and all(only_consumer(graph, name) for name in inner):
            fused = Node(multiply.name, SiluMultiply(), split.inputs, multiply.outputs, multiply.layer)
            return Replacement((split, silu, multiply), (fused,), inner)
    return None


def fuse_add_norm(graph: ExecutionGraph) -> ExecutionGraph:
    """A residual add and the RMS norm of its sum. The sum stays, for the next residual add."""
    taken: set[str] = set()
    replacements = []
    for norm in graph.nodes:
        add = graph.producers.get(norm.inputs[0]) if isinstance(norm.operator, RmsNorm) else None
        if add is None or not isinstance(add.operator, Add) or add.name in taken:
            continue
        assert isinstance(norm.operator, RmsNorm)
        taken.add(add.name)
        residual, x = add.inputs
        outputs = (*norm.outputs, *add.outputs)
        fused = Node(norm.name, AddRmsNorm(norm.operator.eps), (x, residual, norm.inputs[1]), outputs, norm.layer)
        replacements.append(Replacement((add, norm), (fused,)))
    return replace_all(graph, replacements)


def fuse_rotary_kv_write(graph: ExecutionGraph) -> ExecutionGraph:
    """Rotation of queries and keys with the write of keys and values, for each layer."""
    found = [_rotary_kv_write(graph, node) for node in graph.nodes if isinstance(node.operator, KVWrite)]
    return replace_all(graph, [replacement for replacement in found if replacement])


def _rotary_kv_write(graph: ExecutionGraph, write: Node) -> Replacement | None:
    keys, values = write.inputs
    of_keys = graph.producers.get(keys)
    if of_keys is None or not isinstance(of_keys.operator, Rotary) or only_consumer(graph, keys) is not write:
        return None
    rotary, positions = of_keys.operator, of_keys.inputs[1]
    of_queries = [
        node
        for node in graph.consumers[positions]
        if node.operator == rotary and node.layer == write.layer and node is not of_keys and node.inputs[1] == positions
    ]
    if len(of_queries) != 1:
        return None
    (queries,) = of_queries
    fused = Node(
        name=write.name,
        operator=RotaryKVWrite(rotary.head_dim, rotary.rope),
        inputs=(queries.inputs[0], of_keys.inputs[0], values, positions),
        outputs=queries.outputs,
        layer=write.layer,
    )
    return Replacement((queries, of_keys, write), (fused,), (keys,))


def fuse_head_norms(graph: ExecutionGraph) -> ExecutionGraph:
    """The norms of query and key heads with what ``fuse_rotary_kv_write`` made, which must come before."""
    found = [_head_norms(graph, node) for node in graph.nodes if isinstance(node.operator, RotaryKVWrite)]
    return replace_all(graph, [replacement for replacement in found if replacement])


def _head_norms(graph: ExecutionGraph, write: Node) -> Replacement | None:
    operator = write.operator
    assert isinstance(operator, RotaryKVWrite)
    q, k, v, positions = write.inputs
    q_norm, k_norm = graph.producers.get(q), graph.producers.get(k)
    if q_norm is None or k_norm is None or q == k:
        return None
    norm = q_norm.operator
    if not isinstance(norm, HeadRmsNorm) or k_norm.operator != norm or norm.head_dim != operator.head_dim:
        return None
    if only_consumer(graph, q) is not write or only_consumer(graph, k) is not write or v in (q, k):
        return None
    fused = Node(
        name=write.name,
        operator=HeadNormRotaryKVWrite(operator.head_dim, operator.rope, norm.eps),
        inputs=(q_norm.inputs[0], k_norm.inputs[0], v, positions, q_norm.inputs[1], k_norm.inputs[1]),
        outputs=write.outputs,
        layer=write.layer,
    )
    return Replacement((q_norm, k_norm, write), (fused,), (q, k))
