"""A graph cut into parts, of which some are given to torch.compile and the others run operator by operator.

Parts that compute the same of other weights share their code, so one compiled function serves all layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from backends.lowering.operator_calls import OperatorCall, RankContext, operator_call
from backends.operators import reference
from backends.operators.registry import Kernel
from backends.step_inputs import KVTensors, StepInputs
from sagellm.runtime.execution_graph.ir import AnyOperator, ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import Attention

Kernels = Callable[[str], Kernel]  # by an operator's name
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int], torch.Tensor]
WriteKV = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Code:
    """What a part computes: operators on numbered values, the first of which are what comes in, and weights."""

    operators: tuple[tuple[AnyOperator, tuple[int, ...], tuple[int, ...]], ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring nodes. ``inputs`` and ``outputs`` are activations, by name; ``layer`` is whose cache is used."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: int
    code: Code
    is_compiled: bool


def cut(graph: ExecutionGraph, compiled: Sequence[Sequence[Node]]) -> tuple[Part, ...]:
    """The graph's parts in order: each of ``compiled``, and every other node alone."""
    by_first = {nodes[0].name: tuple(nodes) for nodes in compiled}
    parts, inside = [], {node.name for nodes in compiled for node in nodes}
    for node in graph.nodes:
        if node.name in by_first:
            parts.append(_part(graph, by_first[node.name], is_compiled=True))
        elif node.name not in inside:
            parts.append(_part(graph, (node,), is_compiled=False))
    return tuple(parts)


def whole_layers(graph: ExecutionGraph) -> list[list[Node]]:
    """The nodes of every layer but the first, whose norm has nothing to add."""
    layers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.layer:
            layers.setdefault(node.layer, []).append(node)
    return list(layers.values())


def between_attentions(graph: ExecutionGraph) -> list[list[Node]]:
    """What comes after the attention of each layer but the last, up to the next write to the cache."""
    found: list[list[Node]] = []
    open_one: list[Node] | None = None
    for node in graph.nodes:
        if node.operator.writes_kv and open_one is not None:
            found.append(open_one)
            open_one = None
        elif node.operator.reads_kv:
            open_one = []
        elif open_one is not None:
            open_one.append(node)
    return found


def _part(graph: ExecutionGraph, nodes: tuple[Node, ...], *, is_compiled: bool) -> Part:
    made = {name for node in nodes for name in node.outputs}
    own = {node.name for node in nodes}
    weights = {spec.name for spec in graph.weights}
    read = list(dict.fromkeys(name for node in nodes for name in node.inputs if name not in made))
    inputs = tuple(name for name in read if name not in weights)
    used_weights = tuple(name for name in read if name in weights)
    outputs = tuple(name for node in nodes for name in node.outputs)
    if is_compiled:
        outputs = tuple(name for name in outputs if _is_wanted(graph, name, own))
    numbers = {name: index for index, name in enumerate((*inputs, *used_weights))}
    for node in nodes:
        for name in node.outputs:
            numbers[name] = len(numbers)
    code = Code(
        tuple(
            (node.operator, tuple(numbers[name] for name in node.inputs), tuple(numbers[name] for name in node.outputs))
            for node in nodes
        ),
        tuple(numbers[name] for name in outputs),
    )
    return Part(nodes, inputs, used_weights, outputs, nodes[0].layer or 0, code, is_compiled)


def _is_wanted(graph: ExecutionGraph, name: str, nodes: set[str]) -> bool:
    return name in graph.outputs or any(node.name not in nodes for node in graph.consumers.get(name, ()))


def make_function(part: Part, rank: RankContext, attend: Attend, write_kv: WriteKV) -> Callable[..., Any]:
    """The part's code in torch's operators, but for attention and the cache.

    It takes what comes in, the weights, and the layer's keys, values and slots, and gives a tuple.
    """
    num_inputs, outputs = len(part.inputs), part.code.outputs
    num_given = num_inputs + len(part.weights)
    calls = []
    for operator, sources, targets in part.code.operators:
        weights = tuple(source for source in sources if num_inputs <= source < num_given)
        activations = tuple(source for source in sources if source not in weights)
        call = operator_call(operator, (), rank)
        calls.append((_function(operator, call, attend, write_kv), (*activations, *weights), targets))

    def run(given: tuple[torch.Tensor, ...], cache: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values: dict[int, Any] = dict(enumerate(given))
        for function, sources, targets in calls:
            result = function(cache, *[values[source] for source in sources])
            values.update(zip(targets, result if isinstance(result, tuple) else (result,), strict=True))
        return tuple([values[output] for output in outputs])

    return run


def _function(operator: AnyOperator, call: OperatorCall, attend: Attend, write_kv: WriteKV) -> Callable[..., Any]:
    """Of the layer's cache, activations and weights."""
    constants, attributes = call.constants, call.attributes
    if isinstance(operator, Attention):
        scale, window = operator.scale, operator.sliding_window
        return lambda cache, query: attend(query, cache[0], cache[1], scale, window)
    if operator.writes_kv:
        return lambda cache, *values: write_kv(*values, *constants, *cache)
    run = getattr(reference, call.kernel)
    return lambda cache, *values: run(*values, *constants, **attributes)


class PartsProgram:
    """Runs a graph part by part: the compiled ones as ``compiled`` says, the others by the backend's kernels."""

    def __init__(
        self,
        graph: ExecutionGraph,
        parts: tuple[Part, ...],
        weights: dict[str, torch.Tensor],
        kernels: Kernels,
        rank: RankContext,
    ) -> None:
        self._graph = graph
        self.parts = parts
        self._weights = weights
        self._kernels = kernels
        self._rank = rank
        last = {name: index for index, part in enumerate(parts) for name in part.inputs}
        self._dead = [[name for name in part.inputs if last[name] == index] for index, part in enumerate(parts)]

    def run(
        self, inputs: StepInputs, kv: KVTensors, attention_inputs: Any, compiled: Callable[..., Any]
    ) -> torch.Tensor:
        """Logits in float32. ``compiled(given, cache)`` is a compiled part's function."""
        values: dict[str, Any] = {name: getattr(inputs, name) for name in self._graph.inputs}
        for part, dead in zip(self.parts, self._dead, strict=True):
            given = tuple([values[name] for name in part.inputs] + [self._weights[name] for name in part.weights])
            cache = (kv.keys[part.layer], kv.values[part.layer], inputs.slot_mapping)
            if part.is_compiled:
                results = compiled(given, self._cache_of(part, kv, inputs))
            else:
                results = self._launch(part.nodes[0].operator, given, cache, attention_inputs)
            values.update(zip(part.outputs, results, strict=True))
            for name in dead:
                del values[name]
        logits: torch.Tensor = values[self._graph.outputs[0]]
        return logits.float()

    def _cache_of(self, part: Part, kv: KVTensors, inputs: StepInputs) -> tuple[torch.Tensor, ...]:
        """Nothing for parts that do not touch it: what is given must be alike for all that share code."""
        uses = any(node.operator.writes_kv or node.operator.reads_kv for node in part.nodes)
        return (kv.keys[part.layer], kv.values[part.layer], inputs.slot_mapping) if uses else ()

    def _launch(
        self, operator: AnyOperator, given: tuple[torch.Tensor, ...], cache: tuple[torch.Tensor, ...], prepared: Any
    ) -> tuple[torch.Tensor, ...]:
        call = operator_call(operator, (), self._rank)
        run = self._kernels(call.kernel).run
        if isinstance(operator, Attention):
            return (run(given[0], cache[0], cache[1], prepared, **call.attributes),)
        if operator.writes_kv:
            return (run(*given, *call.constants, *cache, **call.attributes),)
        result = run(*given, *call.constants, **call.attributes)
        return result if isinstance(result, tuple) else (result,)
