"""A lowered graph: a flat list of launches over numbered registers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from backends.lowering.kv_sends import KVSends
from backends.lowering.launches import AttentionInputs, Launch, PrepareAttention, StepState
from backends.lowering.side_streams import SideStreams
from backends.step_inputs import KVTensors, StepInputs


@dataclass(frozen=True, slots=True)
class ProgramRegisters:
    """Which registers a program has."""

    count: int
    inputs: dict[str, int]  # by the names of the graph's inputs
    hidden: tuple[int, ...]  # of all rows, from which those of the sampled ones are selected
    output: int


class GraphProgram:
    """A model's graph for one rank and device. Memory of activations is torch's allocator's.

    A register lets go of its tensor as soon as no launch needs it (``lifetimes``), so the allocator hands its
    memory to the next; on accelerators that is a lookup in the allocator's cache. Nothing here waits for
    the device. ``num_launches`` counts operators that run something (views do not).
    """

    def __init__(
        self,
        launches: tuple[Launch, ...],
        *,
        registers: ProgramRegisters,
        prepare_attention: tuple[PrepareAttention, ...],
        num_views: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.vocab_size = vocab_size
        self.launches = launches
        self.num_launches = len(launches) - num_views
        self._registers = registers
        self._prepare_attention = prepare_attention
        self._steps = tuple((launch.run, launch.dead) for launch in launches)
        on_the_side = device.type != "cpu" and any(launch.stream != "compute" for launch in launches)
        self._streams = SideStreams(launches, device) if on_the_side else None
        self._num_body = next(index for index, launch in enumerate(launches) if launch.operator == "select_rows")

    def run(self, inputs: StepInputs, kv: KVTensors, kv_sends: KVSends | None = None) -> torch.Tensor:
        """Write this step's K and V into the cache; logits [num_sampled, vocab_size] in float32.

        ``kv_sends`` is what the graph's ``KVSend`` nodes stage; without it they have nothing to do. All work,
        on whatever stream, is over when what the caller's stream has been given is.
        """
        step = self._begin(inputs, kv, kv_sends)
        if self._streams is None:
            _run_in_order(self._steps, step)
        else:
            self._streams.run(step)
        logits: torch.Tensor = step.registers[self._registers.output]
        # A copy is the caller's stream's own; the original may be another stream's, and be handed out there again.
        return logits.float() if self._streams is None else logits.to(torch.float32, copy=True)

    def all_rows(self, inputs: StepInputs, kv: KVTensors) -> tuple[torch.Tensor, ...]:
        """The part of a step before rows are selected. Writes K and V; what the other part starts with."""
        assert self._streams is None, "a step in two parts runs on one stream"
        step = self._begin(inputs, kv, None)
        _run_in_order(self._steps[: self._num_body], step)
        return tuple(step.registers[register] for register in self._registers.hidden)

    def logits(self, hidden: tuple[torch.Tensor, ...], inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        """From what ``all_rows`` gave, of the sampled rows: [num_sampled, vocab_size] in the model's type."""
        step = self._begin(inputs, kv, None)
        for register, tensor in zip(self._registers.hidden, hidden, strict=True):
            step.registers[register] = tensor
        _run_in_order(self._steps[self._num_body :], step)
        logits: torch.Tensor = step.registers[self._registers.output]
        return logits

    def _begin(self, inputs: StepInputs, kv: KVTensors, kv_sends: KVSends | None) -> StepState:
        registers: list[Any] = [None] * self._registers.count
        for name, register in self._registers.inputs.items():
            registers[register] = getattr(inputs, name)
        return StepState(registers, inputs, kv, self.attention_inputs(inputs, kv), kv_sends)

    def attention_inputs(self, inputs: StepInputs, kv: KVTensors) -> AttentionInputs:
        """What the attention kernel wants of a step."""
        return AttentionInputs(self._prepare_attention, inputs, kv.block_size)


def _run_in_order(launches: tuple[tuple[Callable[[StepState], None], tuple[int, ...]], ...], step: StepState) -> None:
    registers = step.registers
    for launch, dead in launches:
        launch(step)
        for register in dead:
            registers[register] = None
