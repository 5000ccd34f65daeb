"""Gives every activation of a graph a register."""

from collections.abc import Mapping

from sagellm.runtime.execution_graph.ir import ExecutionGraph


class Registers:
    """Numbers of registers by the name of the tensor; free ones are used again."""

    def __init__(self, graph: ExecutionGraph, released_after: Mapping[str, tuple[str, ...]]) -> None:
        self.by_name = {name: number for number, name in enumerate(graph.inputs)}
        free: list[int] = []
        for node in graph.nodes:
            for name in node.outputs:
                self.by_name[name] = free.pop() if free else self.count
            # Freed only now, so that no output takes the register of an input of the same node.
            free += [self.by_name[name] for name in released_after[node.name]]

    @property
    def count(self) -> int:
        return 1 + max(self.by_name.values(), default=-1)

    def numbers(self, names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.by_name[name] for name in names)
