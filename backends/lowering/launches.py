"""One operator of a program, and what the launches of a step work on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.lowering.kv_sends import KVSends
from backends.step_inputs import KVTensors, StepInputs, sampled_inputs
from sagellm.runtime.execution_graph.ir import Stream

PrepareAttention = Callable[[StepInputs, int], Any]  # of a step's inputs and the block size


class AttentionInputs:
    """What attention kernels want of a step, worked out when the first layer asks."""

    def __init__(self, prepare: tuple[PrepareAttention, ...], inputs: StepInputs, block_size: int) -> None:
        self._prepare = prepare  # for each sliding window of the model
        self._inputs = inputs
        self._block_size = block_size
        self._of_all_rows: list[Any] = [None] * len(prepare)
        self._of_sampled_rows: list[Any] = [None] * len(prepare)
        self._sampled_inputs: StepInputs | None = None

    def of_all_rows(self, window: int) -> Any:
        if self._of_all_rows[window] is None:
            self._of_all_rows[window] = self._prepare[window](self._inputs, self._block_size)
        return self._of_all_rows[window]

    def of_sampled_rows(self, window: int) -> Any:
        if self._inputs.samples_all_rows:
            return self.of_all_rows(window)
        if self._of_sampled_rows[window] is None:
            if self._sampled_inputs is None:
                self._sampled_inputs = sampled_inputs(self._inputs)
            self._of_sampled_rows[window] = self._prepare[window](self._sampled_inputs, self._block_size)
        return self._of_sampled_rows[window]


@dataclass(slots=True)
class StepState:
    """What the launches of one step work on."""

    registers: list[Any]  # tensors, by the number of the register; None where nothing is live
    inputs: StepInputs
    kv: KVTensors
    attention_inputs: AttentionInputs
    kv_sends: KVSends | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """One operator with all that does not change from step to step bound to it."""

    node: str
    operator: str
    run: Callable[[StepState], None]
    dead: tuple[int, ...]  # registers that are let go of once it is launched
    stream: Stream
    waits: tuple[str, ...]  # nodes of other streams that must be over when it begins
