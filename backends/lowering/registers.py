"""Gives every activation of a graph a register, and says when it is read for the last time."""

from sagellm.runtime.execution_graph.ir import ExecutionGraph


class Registers:
    """Numbers of registers by the name of the tensor; free ones are used again."""

    def __init__(self, graph: ExecutionGraph) -> None:
        self._graph = graph
        weights = {spec.name for spec in graph.weights}
        self.by_name = {name: number for number, name in enumerate(graph.inputs)}
        self.dead_after = _last_readers(graph, weights)
        free: list[int] = []
        for node in graph.nodes:
            for name in node.outputs:
                self.by_name[name] = free.pop() if free else self._count()
            # Freed only now, so that no output takes the register of an input of the same node.
            free += [self.by_name[name] for name in self.dead_after[node.name]]

    @property
    def count(self) -> int:
        return self._count()

    def _count(self) -> int:
        return 1 + max(self.by_name.values(), default=-1)

    def numbers(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.by_name[name] for name in names)


def _last_readers(graph: ExecutionGraph, weights: set[str]) -> dict[str, tuple[str, ...]]:
    """For each node the tensors that nobody reads after it; outputs that nobody reads die with their node."""
    last: dict[str, str] = {}
    for node in graph.nodes:
        for name in (*node.outputs, *node.inputs):
            last[name] = node.name
    dead: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    for name, node_name in last.items():
        if name not in weights and name not in graph.outputs:
            dead[node_name].append(name)
    return {node_name: tuple(names) for node_name, names in dead.items()}
