"""Projections of one input become one: query, key and value; gate and up."""

from collections.abc import Sequence

from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import Linear, Split
from sagellm.runtime.execution_graph.rewriting import Replacement, only_consumer, replace_all
from sagellm.runtime.execution_graph.tensors import Tensor, WeightSpec


def join_projections(graph: ExecutionGraph) -> ExecutionGraph:
    """Linear operators that read one tensor become one, with the rows of their weights below each other.

    Only those are joined that alike have a bias or none, and whose weights nobody else uses.
    """
    groups: dict[tuple[str, int, int | None], list[Node]] = {}
    for node in graph.nodes:
        if isinstance(node.operator, Linear) and all(only_consumer(graph, name) for name in node.inputs[1:]):
            groups.setdefault((node.inputs[0], len(node.inputs), node.layer), []).append(node)
    return replace_all(graph, [_joined(graph, nodes) for nodes in groups.values() if len(nodes) > 1])


def _joined(graph: ExecutionGraph, nodes: Sequence[Node]) -> Replacement:
    x = graph.tensors_by_name[nodes[0].inputs[0]]
    name = _joined_name([node.name for node in nodes])
    old = [list(names) for names in zip(*(node.inputs[1:] for node in nodes), strict=True)]
    specs = [_joined_spec(graph, names, f"{name}.{part}") for names, part in zip(old, ("weight", "bias"), strict=False)]
    dtype = graph.tensors_by_name[old[0][0]].dtype
    widths = tuple(graph.tensors_by_name[node.outputs[0]].width for node in nodes)
    joined = Tensor(name, (*x.shape[:-1], sum(widths)), x.dtype, "activation")
    weights = [Tensor(spec.name, spec.shape, dtype, "weight") for spec in specs]
    layer = nodes[0].layer
    return Replacement(
        removed=tuple(nodes),
        added=(
            Node(name, Linear(), (x.name, *(spec.name for spec in specs)), (name,), layer),
            Node(f"{name}.split", Split(widths), (name,), tuple(node.outputs[0] for node in nodes), layer),
        ),
        removed_tensors=tuple(name for names in old for name in names),
        added_tensors=(joined, *weights),
        added_weights=tuple(specs),
    )


def _joined_spec(graph: ExecutionGraph, names: Sequence[str], joined_name: str) -> WeightSpec:
    specs = [graph.weights_by_name[name] for name in names]
    sources = tuple(source for spec in specs for source in spec.sources)
    return WeightSpec(joined_name, (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:]), sources)


def _joined_name(names: Sequence[str]) -> str:
    """layers.3.q_proj, layers.3.k_proj, layers.3.v_proj: layers.3.q_k_v_proj."""
    prefix = names[0].rpartition(".")[0]
    stems = [name.rpartition(".")[2] for name in names]
    joined = "_".join(stem.removesuffix("_proj") for stem in stems) + "_proj"
    return f"{prefix}.{joined}" if prefix else joined
