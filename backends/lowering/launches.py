"""One operator of a program, and what the launches of a step work on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.lowering.kv_sends import KVSends
from backends.step_inputs import KVTensors, StepInputs
from sagellm.runtime.execution_graph.ir import Stream


@dataclass(slots=True)
class StepState:
    """What the launches of one step work on."""

    registers: list[Any]  # tensors, by the number of the register; None where nothing is live
    inputs: StepInputs
    kv: KVTensors
    attention_inputs: list[Any]  # for each sliding window of the model
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
