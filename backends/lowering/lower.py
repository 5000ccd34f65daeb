"""From an execution graph to a program: every choice that does not depend on the step is made here, once."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from backends.lowering.launches import Launch, PrepareAttention, StepState
from backends.lowering.lifetimes import Lifetimes
from backends.lowering.operator_calls import OperatorCall, RankContext, operator_call
from backends.lowering.program import GraphProgram, ProgramRegisters
from backends.lowering.registers import Registers
from backends.operators.communicator import Communicator, SingleRank
from backends.operators.registry import Kernel, KernelRegistry
from backends.operators.rotary_table import rotary_table
from backends.step_inputs import StepInputs
from sagellm.models.rope import Rope
from sagellm.runtime.execution_graph.ir import ExecutionGraph, Node
from sagellm.runtime.execution_graph.operators import AllReduce, Attention, KVSend, SelectRows
from sagellm.runtime.execution_graph.passes.scheduling import cross_stream_waits


def lower(
    graph: ExecutionGraph,
    weights: Mapping[str, torch.Tensor],
    *,
    kernels: KernelRegistry,
    backend: str,
    device: torch.device | str,
    num_positions: int,
    communicator: Communicator | None = None,
) -> GraphProgram:
    """A program for one rank of the graph.

    Each operator gets ``backend``'s kernel, or the reference where it has none. ``num_positions`` is the
    longest context that will occur, in tokens. On an accelerator nodes run on the graph's streams, waiting
    for nodes of others where an edge says so; on a CPU, one after the other. ``KVSend`` nodes copy what the
    step is told to hand over (``KVSends``) to memory of the host.

    Raises ``ValueError`` where the group is not of the graph's size.
    """
    communicator = communicator or SingleRank()
    if communicator.size != graph.tp:
        raise ValueError(f"communicator: its size is {communicator.size}, must be the graph's tp ({graph.tp})")
    device = torch.device(device)
    return _Lowering(
        graph, weights, kernels, backend, communicator, _RotaryTables(num_positions, device), device
    ).program()


class _RotaryTables:
    """One table for all layers that share a rope."""

    def __init__(self, num_positions: int, device: torch.device) -> None:
        self._num_positions = num_positions
        self._device = device
        self._tables: dict[tuple[Rope, int], torch.Tensor] = {}

    def table(self, rope: Rope, head_dim: int) -> torch.Tensor:
        if (rope, head_dim) not in self._tables:
            self._tables[rope, head_dim] = rotary_table(rope, head_dim, self._num_positions, self._device)
        return self._tables[rope, head_dim]


class _Lowering:
    """Binds node after node."""

    def __init__(
        self,
        graph: ExecutionGraph,
        weights: Mapping[str, torch.Tensor],
        kernels: KernelRegistry,
        backend: str,
        communicator: Communicator,
        tables: _RotaryTables,
        device: torch.device,
    ) -> None:
        self._graph = graph
        self._weights = weights
        self._kernels = kernels
        self._backend = backend
        self._rank = RankContext(communicator, tables.table)
        self._device = device
        self._lifetimes = Lifetimes(graph)
        self._registers = Registers(graph, self._lifetimes.released_after)
        self._waits = cross_stream_waits(graph)
        self._windows: list[int] = []  # sliding windows that occur

    def program(self) -> GraphProgram:
        graph, registers = self._graph, self._registers
        launches = tuple(self._launch(node) for node in graph.nodes)
        logits = graph.tensors_by_name[graph.outputs[0]]
        return GraphProgram(
            launches,
            registers=ProgramRegisters(
                count=registers.count,
                inputs={name: registers.by_name[name] for name in graph.inputs},
                hidden=tuple(registers.by_name[name] for name in _hidden_names(graph)),
                output=registers.by_name[logits.name],
            ),
            prepare_attention=tuple(self._prepare(window) for window in self._windows),
            num_views=sum(node.operator.is_view for node in graph.nodes),
            vocab_size=logits.width,
            device=self._device,
        )

    def _launch(self, node: Node) -> Launch:
        weights = tuple(self._weights[name] for name in node.inputs if name in self._weights)
        sources = self._registers.numbers(tuple(name for name in node.inputs if name not in self._weights))
        targets = self._registers.numbers(node.outputs)
        dead = self._registers.numbers(self._lifetimes.released_after[node.name])
        call = operator_call(node.operator, weights, self._rank)
        kernel = self._kernels.kernel(self._backend, call.kernel)
        run = self._bind(node, kernel, call, (*weights, *call.constants), sources, targets)
        return Launch(node.name, call.kernel, run, dead, node.stream, self._waits.get(node.name, ()))

    def _bind(
        self,
        node: Node,
        kernel: Kernel,
        call: OperatorCall,
        constants: tuple[Any, ...],
        sources: tuple[int, ...],
        targets: tuple[int, ...],
    ) -> Callable[[StepState], None]:
        operator = node.operator
        if isinstance(operator, Attention):
            window = self._window(operator)
            attend = _attention_of_sampled_rows if operator.of_sampled_rows else _attention
            return attend(kernel.run, sources[0], targets[0], node.layer or 0, window, call)
        if isinstance(operator, SelectRows):
            return _row_selection(kernel.run, sources, targets[0])
        if isinstance(operator, KVSend):
            return _kv_sender(kernel.run, node.layer or 0)
        if operator.writes_kv:
            return _kv_writer(kernel.run, sources, targets, constants, node.layer or 0, call.attributes)
        if isinstance(operator, AllReduce) and not self._lifetimes.may_overwrite(node):
            return _plain(_on_a_copy(kernel.run), sources, targets, constants, call.attributes)
        return _plain(kernel.run, sources, targets, constants, call.attributes)

    def _window(self, operator: Attention) -> int:
        if operator.sliding_window not in self._windows:
            self._windows.append(operator.sliding_window)
        return self._windows.index(operator.sliding_window)

    def _prepare(self, sliding_window: int) -> PrepareAttention:
        prepare = self._kernels.kernel(self._backend, "attention").prepare
        if prepare is None:
            return lambda inputs, block_size: inputs

        def prepared(inputs: StepInputs, block_size: int) -> Any:
            return prepare(inputs, block_size=block_size, sliding_window=sliding_window)

        return prepared


def _hidden_names(graph: ExecutionGraph) -> tuple[str, ...]:
    """What nodes from the first `SelectRows` on read of the nodes before it."""
    first = next(place for place, node in enumerate(graph.nodes) if isinstance(node.operator, SelectRows))
    before = {output for node in graph.nodes[:first] for output in node.outputs}
    return tuple(dict.fromkeys(name for node in graph.nodes[first:] for name in node.inputs if name in before))


def _plain(
    run: Callable[..., Any],
    sources: tuple[int, ...],
    targets: tuple[int, ...],
    constants: tuple[Any, ...],
    attributes: dict[str, Any],
) -> Callable[[StepState], None]:
    """``run`` of registers and constants; one function for each number of registers, to keep steps short."""
    if len(targets) != 1:

        def many_outputs(step: StepState) -> None:
            registers = step.registers
            results = run(*[registers[source] for source in sources], *constants, **attributes)
            for target, result in zip(targets, results, strict=True):
                registers[target] = result

        return many_outputs
    target = targets[0]
    if len(sources) == 1:
        source = sources[0]

        def one_input(step: StepState) -> None:
            step.registers[target] = run(step.registers[source], *constants, **attributes)

        return one_input

    def several_inputs(step: StepState) -> None:
        registers = step.registers
        registers[target] = run(*[registers[source] for source in sources], *constants, **attributes)

    return several_inputs


def _kv_writer(
    run: Callable[..., Any],
    sources: tuple[int, ...],
    targets: tuple[int, ...],
    constants: tuple[Any, ...],
    layer: int,
    attributes: dict[str, Any],
) -> Callable[[StepState], None]:
    def write(step: StepState) -> None:
        registers, kv = step.registers, step.kv
        cache = (kv.keys[layer], kv.values[layer], step.inputs.slot_mapping)
        result = run(*[registers[source] for source in sources], *constants, *cache, **attributes)
        for target in targets:
            registers[target] = result

    return write


def _kv_sender(run: Callable[..., Any], layer: int) -> Callable[[StepState], None]:
    def send(step: StepState) -> None:
        kv, sends = step.kv, step.kv_sends
        if sends is not None:
            run(kv.keys[layer], kv.values[layer], sends.slots, sends.staging[layer])

    return send


def _attention(
    run: Callable[..., Any], source: int, target: int, layer: int, window: int, call: OperatorCall
) -> Callable[[StepState], None]:
    attributes = call.attributes

    def attend(step: StepState) -> None:
        registers, kv = step.registers, step.kv
        registers[target] = run(
            registers[source], kv.keys[layer], kv.values[layer], step.attention_inputs.of_all_rows(window), **attributes
        )

    return attend


def _attention_of_sampled_rows(
    run: Callable[..., Any], source: int, target: int, layer: int, window: int, call: OperatorCall
) -> Callable[[StepState], None]:
    attributes = call.attributes

    def attend(step: StepState) -> None:
        registers, kv = step.registers, step.kv
        query = registers[source]
        if not query.shape[0]:
            registers[target] = torch.empty_like(query)  # a step may sample no row
            return
        inputs = step.attention_inputs.of_sampled_rows(window)
        registers[target] = run(query, kv.keys[layer], kv.values[layer], inputs, **attributes)

    return attend


def _row_selection(run: Callable[..., Any], sources: tuple[int, ...], target: int) -> Callable[[StepState], None]:
    x, rows = sources

    def select(step: StepState) -> None:
        registers = step.registers
        registers[target] = registers[x] if step.inputs.samples_all_rows else run(registers[x], registers[rows])

    return select


def _on_a_copy(run: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction may write over its input, which somebody still reads."""
    return lambda x, *constants: run(x.clone(), *constants)
