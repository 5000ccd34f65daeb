"""Checks of an execution graph. A graph that passes can be run."""

from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import must_be, shape_text
from sagellm.runtime.execution_graph.tensors import DTYPE_BYTES, Tensor, TensorType


def validate(graph: ExecutionGraph) -> None:
    """Raises ``ValueError``, one sentence that names node or tensor, where the graph cannot be run.

    Checked are names, that every tensor is there before it is read and written once, shapes and types by
    each operator's rule, that caches are written before they are read, and that weights fit their sources.
    As nodes come in an order that keeps all edges, the graph has no cycle.
    """
    _check_tensors(graph)
    _check_weights(graph)
    _check_nodes(graph)
    _check_kv_order(graph)


def _check_tensors(graph: ExecutionGraph) -> None:
    if len(graph.tensors_by_name) != len(graph.tensors):
        raise ValueError(f"graph of {graph.model}: two tensors have one name")
    for tensor in graph.tensors:
        if tensor.dtype not in DTYPE_BYTES:
            raise ValueError(f"tensor {tensor.name}: dtype is {tensor.dtype}, must be one of {', '.join(DTYPE_BYTES)}")
        if any(isinstance(dim, int) and dim < 1 for dim in tensor.shape):
            raise ValueError(f"tensor {tensor.name}: shape is {shape_text(tensor.shape)}, sizes must be 1 or more")
    stated = {tensor.name for tensor in graph.tensors if tensor.kind == "input"}
    if stated != set(graph.inputs):
        raise ValueError(f"graph of {graph.model}: inputs are {sorted(graph.inputs)}, its tensors say {sorted(stated)}")


def _check_weights(graph: ExecutionGraph) -> None:
    stated = {tensor.name: tensor for tensor in graph.tensors if tensor.kind == "weight"}
    if sorted(stated) != sorted(spec.name for spec in graph.weights):
        raise ValueError(f"graph of {graph.model}: not every weight says once what it is made from")
    for spec in graph.weights:
        must_be(f"weight {spec.name}", stated[spec.name].shape, spec.shape)
        if not spec.sources:
            raise ValueError(f"weight {spec.name}: it has no sources")
        parts = [source.rank_shape for source in spec.sources]
        if len({part[1:] for part in parts}) != 1 or not _holds(spec.shape, parts):
            raise ValueError(f"weight {spec.name}: parts {parts} cannot be joined to {shape_text(spec.shape)}")


def _holds(shape: tuple[int, ...], parts: list[tuple[int, ...]]) -> bool:
    """Whether parts joined along dimension 0 are ``shape``, but for leading dimensions that are split."""
    rows, inner = sum(part[0] for part in parts), parts[0][1:]
    kept = len(shape) - len(inner)
    leading = 1
    for dim in shape[:kept]:
        leading *= dim
    return shape[kept:] == inner and leading == rows


def _check_nodes(graph: ExecutionGraph) -> None:
    there = {tensor.name for tensor in graph.tensors if tensor.kind != "activation"}
    names: set[str] = set()
    for node in graph.nodes:
        if node.name in names:
            raise ValueError(f"node {node.name}: there are two of that name")
        names.add(node.name)
        for name in node.inputs:
            if name not in there:
                raise ValueError(f"node {node.name}: its input {name} does not exist before it")
        _check_types(graph, node)
        for name in node.outputs:
            if name in there:
                raise ValueError(f"node {node.name}: its output {name} is there already")
            there.add(name)
    for name in graph.outputs:
        if name not in there:
            raise ValueError(f"graph of {graph.model}: its output {name} is never produced")


def _check_types(graph: ExecutionGraph, node: Node) -> None:
    operator = node.operator
    if len(node.inputs) not in operator.num_inputs:
        allowed = " or ".join(map(str, operator.num_inputs))
        raise ValueError(f"node {node.name}: it has {len(node.inputs)} inputs, must have {allowed}")
    missing = [name for name in node.outputs if name not in graph.tensors_by_name]
    if missing:
        raise ValueError(f"node {node.name}: its output {missing[0]} is no tensor of the graph")
    try:
        wanted = operator.output_types(graph.tensors_of(node.inputs))
    except ValueError as error:
        raise ValueError(f"node {node.name}: {error}") from error
    outputs = graph.tensors_of(node.outputs)
    if [_type_of(output) for output in outputs] != list(wanted):
        raise ValueError(f"node {node.name}: its outputs are {_texts(outputs)}, must be {_texts(wanted)}")


def _type_of(tensor: Tensor) -> TensorType:
    return TensorType(tensor.shape, tensor.dtype)


def _texts(types: tuple[Tensor, ...] | tuple[TensorType, ...]) -> str:
    return "; ".join(f"{one.dtype}{shape_text(one.shape)}" for one in types) or "none"


def _check_kv_order(graph: ExecutionGraph) -> None:
    position = {node.name: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        effects = node.operator.reads_kv or node.operator.writes_kv
        if effects and (node.layer is None or not 0 <= node.layer < graph.num_layers):
            raise ValueError(f"node {node.name}: it uses the KV of layer {node.layer}, of {graph.num_layers} layers")
    written: dict[int | None, str] = {}
    for node in graph.nodes:
        if node.operator.writes_kv and written.setdefault(node.layer, node.name) != node.name:
            raise ValueError(f"node {node.name}: {written[node.layer]} writes the KV of layer {node.layer} already")
    readers = {edge.after for edge in graph.edges if edge.kind == "kv"}
    for node in graph.nodes:
        if node.operator.reads_kv and node.name not in readers:
            raise ValueError(f"node {node.name}: nothing writes the KV of layer {node.layer}")
    for edge in graph.edges:
        if edge.kind == "kv" and position[edge.before] > position[edge.after]:
            raise ValueError(f"node {edge.after}: it reads KV that {edge.before} writes only later")
