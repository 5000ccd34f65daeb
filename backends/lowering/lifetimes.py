"""How long each tensor of a graph must be kept, where nodes run on several streams."""

from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node, Stream
from sagellm.runtime.execution_graph.ordering import predecessor_sets
from sagellm.runtime.execution_graph.passes.memory import storage_names


class Lifetimes:
    """Who uses what, and what is over when a node begins: edges and common streams say so, the order alone does not."""

    def __init__(self, graph: ExecutionGraph) -> None:
        self._graph = graph
        self._before = predecessor_sets(graph.nodes, graph.edges)
        self._position = {node.name: position for position, node in enumerate(graph.nodes)}
        self._users = _users(graph)
        self._storage = storage_names(graph)
        self.released_after = self._released_after()

    def may_overwrite(self, node: Node) -> bool:
        """Whether everybody else who reads the memory of the node's first input is over when the node begins."""
        storage = self._storage.get(node.inputs[0], node.inputs[0])
        sharing = [name for name in self._users if self._storage.get(name, name) == storage]
        if any(name in self._graph.outputs for name in sharing):
            return False
        return all(self._covers(node, self._users[name]) for name in sharing)

    def _released_after(self) -> dict[str, tuple[str, ...]]:
        """For each node the tensors that may be let go of once it is launched.

        An allocator hands memory that was let go of to whatever is launched next on the stream on which it was
        allocated. So a tensor is kept until that stream has been given a node that comes after all its users, or is
        the last of them. On a single stream that is its last reader.
        """
        released: dict[str, list[str]] = {node.name: [] for node in self._graph.nodes}
        streams = _allocating_streams(self._graph)
        for name, users in self._users.items():
            if name in self._graph.outputs:
                continue
            last_user = users.bit_length() - 1
            positions = [self._first_behind(users, stream) for stream in streams.get(name, ())]
            if None not in positions:
                node = self._graph.nodes[max([last_user, *(one for one in positions if one is not None)])]
                released[node.name].append(name)
        return {name: tuple(tensors) for name, tensors in released.items()}

    def _first_behind(self, users: int, stream: Stream) -> int | None:
        """The first node of the stream that comes after all users or is one; None: the end of the step is the first."""
        for position in range(users.bit_length() - 1, len(self._graph.nodes)):
            node = self._graph.nodes[position]
            if node.stream == stream and self._covers(node, users):
                return position
        return None

    def _covers(self, node: Node, users: int) -> bool:
        return not users & ~(self._before[node.name] | 1 << self._position[node.name])


def _users(graph: ExecutionGraph) -> dict[str, int]:
    """For each tensor that is no weight the nodes that write or read it, as bits by position."""
    weights = {spec.name for spec in graph.weights}
    users: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        for name in (*node.outputs, *node.inputs):
            if name not in weights:
                users[name] = users.get(name, 0) | 1 << position
    return users


def _allocating_streams(graph: ExecutionGraph) -> dict[str, frozenset[Stream]]:
    """The streams on which a tensor's memory may have been allocated; none for inputs, which are the caller's.

    A collective may give back the very tensor that it was given.
    """
    streams: dict[str, frozenset[Stream]] = {}
    for node in graph.nodes:
        operator = node.operator
        own: frozenset[Stream] = frozenset() if operator.is_view else frozenset((node.stream,))
        if operator.is_view or operator.is_collective:
            own |= streams.get(node.inputs[0], frozenset())
        for output in node.outputs:
            streams[output] = own
    return streams
