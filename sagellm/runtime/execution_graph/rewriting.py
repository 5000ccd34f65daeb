"""Replaces groups of nodes by others."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.ordering import sorted_nodes
from sagellm.runtime.execution_graph.tensors import Tensor, WeightSpec


@dataclass(frozen=True, slots=True)
class Replacement:
    """``removed`` nodes, all of which ``added`` ones stand for, with the tensors that come and go.

    The first added node takes the place of the first node that is removed.
    """

    removed: tuple[Node, ...]
    added: tuple[Node, ...]
    removed_tensors: tuple[str, ...] = ()
    added_tensors: tuple[Tensor, ...] = ()
    added_weights: tuple[WeightSpec, ...] = ()


def replace_all(graph: ExecutionGraph, replacements: Sequence[Replacement]) -> ExecutionGraph:
    """The graph with every replacement made that leaves it without a cycle. They must not share nodes."""
    if not replacements:
        return graph
    rewritten = _replaced(graph, replacements)
    if rewritten is not None:
        return rewritten
    for replacement in replacements:
        graph = _replaced(graph, [replacement]) or graph
    return graph


def _replaced(graph: ExecutionGraph, replacements: Sequence[Replacement]) -> ExecutionGraph | None:
    """None where the result would have a cycle."""
    gone_nodes = {node.name for one in replacements for node in one.removed}
    gone_tensors = {name for one in replacements for name in one.removed_tensors}
    added_at = {one.removed[0].name: one.added for one in replacements}
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.extend(added_at.get(node.name, ()))
        if node.name not in gone_nodes:
            nodes.append(node)
    kept_tensors = [tensor for tensor in graph.tensors if tensor.name not in gone_tensors]
    kept_weights = [spec for spec in graph.weights if spec.name not in gone_tensors]
    candidate = msgspec.structs.replace(
        graph,
        tensors=(*kept_tensors, *(tensor for one in replacements for tensor in one.added_tensors)),
        weights=(*kept_weights, *(spec for one in replacements for spec in one.added_weights)),
        nodes=tuple(nodes),
    )
    order = sorted_nodes(candidate.nodes, candidate.edges)
    return None if order is None else msgspec.structs.replace(candidate, nodes=order)


def only_consumer(graph: ExecutionGraph, tensor: str) -> Node | None:
    """The one node that reads ``tensor``, where there is just one and the tensor is no output of the graph."""
    consumers = graph.consumers.get(tensor, ())
    return consumers[0] if len(consumers) == 1 and tensor not in graph.outputs else None
