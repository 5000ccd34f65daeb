"""A lowered graph: a flat list of launches over numbered registers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from backends.step_inputs import KVTensors, StepInputs

PrepareAttention = Callable[[StepInputs, int], Any]  # of a step's inputs and the block size


@dataclass(slots=True)
class StepState:
    """What the launches of one step work on."""

    registers: list[Any]  # tensors, by the number of the register; None where nothing is live
    inputs: StepInputs
    kv: KVTensors
    attention_inputs: list[Any]  # for each sliding window of the model


@dataclass(frozen=True, slots=True)
class Launch:
    """One operator with all that does not change from step to step bound to it."""

    node: str
    operator: str
    run: Callable[[StepState], None]
    dead: tuple[int, ...]  # registers that nobody reads after it


class GraphProgram:
    """A model's graph for one rank and device. Memory of activations is torch's allocator's.

    A register lets go of its tensor after the last launch that reads it, so the allocator hands its
    memory to the next; on accelerators that is a lookup in the allocator's cache. Nothing here waits for
    the device. ``num_launches`` counts operators that run something (views do not).
    """

    def __init__(
        self,
        launches: tuple[Launch, ...],
        *,
        num_registers: int,
        input_registers: dict[str, int],
        output_register: int,
        prepare_attention: tuple[PrepareAttention, ...],
        num_views: int,
        vocab_size: int,
    ) -> None:
        self.vocab_size = vocab_size
        self.launches = launches
        self.num_launches = len(launches) - num_views
        self._steps = tuple((launch.run, launch.dead) for launch in launches)
        self._num_registers = num_registers
        self._token_ids = input_registers["token_ids"]
        self._positions = input_registers["positions"]
        self._sampled_rows = input_registers["sampled_rows"]
        self._output = output_register
        self._prepare_attention = prepare_attention

    def run(self, inputs: StepInputs, kv: KVTensors) -> torch.Tensor:
        """Write this step's K and V into the cache; logits [num_sampled, vocab_size] in float32."""
        registers: list[Any] = [None] * self._num_registers
        registers[self._token_ids] = inputs.token_ids
        registers[self._positions] = inputs.positions
        registers[self._sampled_rows] = inputs.sampled_rows
        step = StepState(registers, inputs, kv, self.attention_inputs(inputs, kv))
        for launch, dead in self._steps:
            launch(step)
            for register in dead:
                registers[register] = None
        logits: torch.Tensor = registers[self._output]
        return logits.float()

    def attention_inputs(self, inputs: StepInputs, kv: KVTensors) -> list[Any]:
        """What the attention kernel wants of a step, for each sliding window of the model."""
        return [prepare(inputs, kv.block_size) for prepare in self._prepare_attention]
