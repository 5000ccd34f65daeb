"""Orders in which a graph's nodes may run."""

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from sagellm.runtime.execution_graph.ir import Edge, Node


def sorted_nodes(nodes: Sequence[Node], edges: Iterable[Edge]) -> tuple[Node, ...] | None:
    """``nodes`` in an order that keeps all edges and is otherwise theirs; None where the edges make a cycle."""
    position = {node.name: index for index, node in enumerate(nodes)}
    followers: list[list[int]] = [[] for _ in nodes]
    num_waited_for = [0] * len(nodes)
    for edge in edges:
        followers[position[edge.before]].append(position[edge.after])
        num_waited_for[position[edge.after]] += 1
    ready = [index for index, count in enumerate(num_waited_for) if not count]
    heapify(ready)
    order: list[Node] = []
    while ready:
        index = heappop(ready)
        order.append(nodes[index])
        for follower in followers[index]:
            num_waited_for[follower] -= 1
            if not num_waited_for[follower]:
                heappush(ready, follower)
    return tuple(order) if len(order) == len(nodes) else None


def predecessor_sets(nodes: Sequence[Node], edges: Iterable[Edge]) -> dict[str, int]:
    """For each node the set of nodes that are over before it begins, as bits by position in ``nodes``.

    Besides ``edges``, nodes of one stream run one after the other.
    """
    position = {node.name: index for index, node in enumerate(nodes)}
    before: dict[str, list[str]] = {node.name: [] for node in nodes}
    for edge in edges:
        before[edge.after].append(edge.before)
    last_of_stream: dict[str, str] = {}
    sets: dict[str, int] = {}
    for node in nodes:
        if node.stream in last_of_stream:
            before[node.name].append(last_of_stream[node.stream])
        last_of_stream[node.stream] = node.name
        bits = 0
        for name in before[node.name]:
            bits |= sets[name] | 1 << position[name]
        sets[node.name] = bits
    return sets
