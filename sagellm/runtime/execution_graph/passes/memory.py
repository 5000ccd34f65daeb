"""Where activations lie: buffers are used again once nobody reads them any more."""

from dataclasses import dataclass

from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.ordering import predecessor_sets
from sagellm.runtime.execution_graph.tensors import StepSizes

ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one activation lies, or the workspace of one node."""

    name: str  # of the tensor; of the node with ``workspace`` behind it
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """Offsets into one arena. They hold for every step no larger than ``sizes``, as tensors only shrink with it.

    Views (the outputs of a split) are no placements of their own: they lie in the tensor that they show.
    """

    sizes: StepSizes
    placements: tuple[Placement, ...]
    peak_bytes: int  # size of the arena
    unshared_bytes: int  # what it would be, had each tensor its own place


@dataclass(slots=True)
class _Buffer:
    name: str
    num_bytes: int
    defined_at: int  # position of the node that writes it
    users: int  # nodes that write or read it, as bits
    kept: bool  # an output of the graph


def plan_buffers(graph: ExecutionGraph, sizes: StepSizes) -> BufferPlan:
    """Places all activations, large ones first, each at the lowest offset that is free for its whole life.

    A buffer's life ends when all its readers are over, which a later node can rely on only where edges or
    a common stream put it behind them; so plans hold for the graph's streams, not just for its order.
    """
    buffers = _buffers(graph, sizes)
    predecessors = predecessor_sets(graph.nodes, graph.edges)
    before = [predecessors[node.name] for node in graph.nodes]
    placed: list[tuple[int, _Buffer]] = []
    for buffer in sorted(buffers, key=lambda one: (-one.num_bytes, one.defined_at)):
        taken = sorted((offset, offset + other.num_bytes) for offset, other in placed if _clash(buffer, other, before))
        placed.append((_first_gap(taken, buffer.num_bytes), buffer))
    return BufferPlan(
        sizes=sizes,
        placements=tuple(Placement(buffer.name, offset, buffer.num_bytes) for offset, buffer in placed),
        peak_bytes=max((offset + buffer.num_bytes for offset, buffer in placed), default=0),
        unshared_bytes=sum(buffer.num_bytes for _, buffer in placed),
    )


def storage_names(graph: ExecutionGraph) -> dict[str, str]:
    """For each activation the one in whose memory it lies: its own, unless it is a view."""
    storage: dict[str, str] = {}
    for node in graph.nodes:
        for output in node.outputs:
            source = node.inputs[0] if node.operator.is_view else output
            storage[output] = storage.get(source, source)
    return storage


def _buffers(graph: ExecutionGraph, sizes: StepSizes) -> list[_Buffer]:
    storage = storage_names(graph)
    buffers: dict[str, _Buffer] = {}
    for position, node in enumerate(graph.nodes):
        inputs, outputs = graph.tensors_of(node.inputs), graph.tensors_of(node.outputs)
        written = [(tensor.name, tensor.num_bytes(sizes)) for tensor in outputs if storage[tensor.name] == tensor.name]
        workspace_bytes = node.operator.workspace_bytes(inputs, outputs, sizes)
        if workspace_bytes:
            written.append((f"{node.name}.workspace", workspace_bytes))
        for name, num_bytes in written:
            padded = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            buffers[name] = _Buffer(name, padded, position, 1 << position, False)
        for name in (*node.inputs, *node.outputs):
            if storage.get(name) in buffers:
                buffers[storage[name]].users |= 1 << position
    for output in graph.outputs:
        if storage.get(output) in buffers:
            buffers[storage[output]].kept = True
    return list(buffers.values())


def _first_gap(taken: list[tuple[int, int]], num_bytes: int) -> int:
    """The lowest offset with ``num_bytes`` free; ``taken`` are (offset, end) in order."""
    offset = 0
    for start, end in taken:
        if offset + num_bytes <= start:
            break
        offset = max(offset, end)
    return offset


def _clash(one: _Buffer, other: _Buffer, before: list[int]) -> bool:
    """Whether two may be alive at once: not all that use the earlier are over when the later is written."""
    early, late = (one, other) if one.defined_at <= other.defined_at else (other, one)
    return early.kept or bool(early.users & ~before[late.defined_at])
