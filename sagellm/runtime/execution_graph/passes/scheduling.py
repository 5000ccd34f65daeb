"""Which node runs when, and on which stream: collectives and KV sends overlap with what does not need them."""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

import msgspec

from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node, Stream
from sagellm.runtime.execution_graph.operators import KVSend
from sagellm.runtime.execution_graph.ordering import predecessor_sets


@dataclass(frozen=True, slots=True)
class Schedule:
    """A graph whose nodes have streams and come in the order in which they start, with the times foreseen."""

    graph: ExecutionGraph
    start_ns: tuple[float, ...]  # of each node
    end_ns: tuple[float, ...]

    @property
    def duration_ns(self) -> float:
        return max(self.end_ns, default=0.0)


def schedule(graph: ExecutionGraph, duration_ns: Callable[[Node], float]) -> Schedule:
    """List scheduling (Graham, 1969) on one stream each for compute, collectives and KV sends.

    Of the nodes that could start on a stream, the one with the longest chain of work behind it goes first,
    and among equals the one that came first. Collectives keep their order, so that all ranks, which must be
    given equal durations, meet in the same one. No schedule is longer than running all nodes one by one.
    """
    nodes = [msgspec.structs.replace(node, stream=_stream(node)) for node in graph.nodes]
    work_ns = [duration_ns(node) for node in nodes]
    followers, num_waited_for = _dependencies(graph)
    chains_ns = _chains_ns(work_ns, followers)
    ready: dict[str, list[tuple[float, int]]] = {"compute": [], "collective": [], "kv_send": []}
    for index, count in enumerate(num_waited_for):
        if not count:
            heappush(ready[nodes[index].stream], (-chains_ns[index], index))
    running: list[tuple[float, int]] = []  # end, node
    busy: set[str] = set()
    placed: list[tuple[float, float, int]] = []
    now_ns = 0.0
    while len(placed) < len(nodes):
        for stream, waiting in ready.items():
            if waiting and stream not in busy:
                _, index = heappop(waiting)
                placed.append((now_ns, now_ns + work_ns[index], index))
                heappush(running, (now_ns + work_ns[index], index))
                busy.add(stream)
        now_ns, finished = heappop(running)
        busy.discard(nodes[finished].stream)
        for follower in followers[finished]:
            num_waited_for[follower] -= 1
            if not num_waited_for[follower]:
                heappush(ready[nodes[follower].stream], (-chains_ns[follower], follower))
    return Schedule(
        graph=msgspec.structs.replace(graph, nodes=tuple(nodes[index] for _, _, index in placed)),
        start_ns=tuple(start for start, _, _ in placed),
        end_ns=tuple(end for _, end, _ in placed),
    )


def cross_stream_waits(graph: ExecutionGraph) -> dict[str, tuple[str, ...]]:
    """For each node the nodes of other streams that it must wait for, without those that other waits imply."""
    before = predecessor_sets(graph.nodes, graph.edges)
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    previous: dict[str, str] = {}
    last_of_stream: dict[Stream, str] = {}
    for node in graph.nodes:
        if node.stream in last_of_stream:
            previous[node.name] = last_of_stream[node.stream]
        last_of_stream[node.stream] = node.name
    stream_of = {node.name: node.stream for node in graph.nodes}
    wanted: dict[str, set[str]] = {}
    for edge in graph.edges:
        if stream_of[edge.before] != stream_of[edge.after]:
            wanted.setdefault(edge.after, set()).add(edge.before)
    waits: dict[str, tuple[str, ...]] = {}
    for name, sources in wanted.items():
        others = sources | ({previous[name]} if name in previous else set())
        needed = (one for one in sources if not any(before[other] >> position[one] & 1 for other in others))
        found = tuple(sorted(needed, key=position.__getitem__))
        if found:
            waits[name] = found
    return waits


def _stream(node: Node) -> Stream:
    if node.operator.is_collective:
        return "collective"
    return "kv_send" if isinstance(node.operator, KVSend) else "compute"


def _dependencies(graph: ExecutionGraph) -> tuple[list[list[int]], list[int]]:
    """Who waits for each node, and for how many each waits; collectives wait for the one before."""
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    pairs = [(position[edge.before], position[edge.after]) for edge in graph.edges]
    collectives = [position[node.name] for node in graph.nodes if node.operator.is_collective]
    pairs += pairwise(collectives)
    followers: list[list[int]] = [[] for _ in graph.nodes]
    num_waited_for = [0] * len(graph.nodes)
    for before, after in pairs:
        followers[before].append(after)
        num_waited_for[after] += 1
    return followers, num_waited_for


def _chains_ns(work_ns: list[float], followers: list[list[int]]) -> list[float]:
    """The longest chain of work from each node's start on; nodes come in a valid order."""
    chains = list(work_ns)
    for index in range(len(work_ns) - 1, -1, -1):
        chains[index] += max((chains[follower] for follower in followers[index]), default=0.0)
    return chains
