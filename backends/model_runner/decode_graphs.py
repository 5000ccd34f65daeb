"""Steps in which every sequence decodes one token, captured once in device graphs and replayed from then on.

A graph saves the host from launching each operator. It is made for a number of sequences; a step with fewer
fills up with rows that are of no account.
"""

from dataclasses import dataclass
from typing import TextIO

import torch

from backends.base import DrawTokens, HardwareBackend
from backends.model_runner.batch_sizes import captured_sizes
from backends.model_runner.captured_inputs import CapturedInputs
from backends.model_runner.graph_set import GraphSet
from backends.model_runner.kv_blocks import KVBlocks
from backends.step_inputs import ModelProgram, SplitProgram
from backends.streams import DeviceGraph


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph and the memory that belongs to its number of sequences."""

    num_seqs: int
    spare_slot: int  # where rows write that only fill the step up
    graph: DeviceGraph
    token_ids: torch.Tensor  # [num_seqs] int32
    places: torch.Tensor  # [NUM_PLACES, num_seqs] int64: see `CapturedInputs.places`
    block_tables: torch.Tensor  # [num_seqs, num_blocks_max] int32
    logits: torch.Tensor  # [num_seqs, vocab_size], in the model's type where the program gives them so
    drawn: tuple[torch.Tensor, torch.Tensor] | None  # tokens and whether they are invalid, where a kernel draws


class DecodeGraphs:
    """The captured steps of one model on one device."""

    def __init__(
        self, program: ModelProgram, kv: KVBlocks, num_positions: int, backend: HardwareBackend, device_index: int
    ) -> None:
        self._program = program
        self._kv = kv
        self._num_positions = num_positions
        self._draw_tokens = backend.token_drawing()
        self._device = backend.torch_device(device_index)
        self.graphs: GraphSet[CapturedStep] = GraphSet("decode", "sequences", backend, device_index)

    def __len__(self) -> int:
        return len(self.graphs)

    def capture(self, num_seqs_max: int, terminal: TextIO) -> None:
        """Capture steps of up to so many sequences. What is captured writes to nobody's block only."""
        sizes = captured_sizes(num_seqs_max)

        def make_maker() -> "_DecodeMaker":
            block_size, spare_slot = self._kv.tensors.block_size, self._kv.spare_slot
            inputs = CapturedInputs(sizes[-1], self._num_positions, block_size, spare_slot, self._device)
            return _DecodeMaker(self._program, self._kv, inputs, self._draw_tokens)

        self.graphs.capture(sizes, make_maker, terminal)

    def step_for(self, num_seqs: int, context_len_max: int) -> CapturedStep | None:
        """The captured step that so many decodes fit into; None where they are to be launched one by one."""
        return self.graphs.smallest(num_seqs) if context_len_max <= self._num_positions else None


class _DecodeMaker:
    """A `StepMaker`."""

    def __init__(
        self, program: ModelProgram, kv: KVBlocks, inputs: CapturedInputs, draw_tokens: DrawTokens | None
    ) -> None:
        self._program = program
        self._kv = kv
        self._inputs = inputs
        self._draw_tokens = draw_tokens

    def fill_up(self, size: int) -> None:
        self._inputs.fill_up(size)

    def run(self, size: int) -> None:
        self._run(size, None)

    def capture(self, size: int, graph: DeviceGraph, largest: CapturedStep | None) -> CapturedStep:
        inputs = self._inputs
        with graph.capture():
            logits, drawn = self._run(size, largest)
        block_tables = inputs.block_tables[:size]
        spare_slot, token_ids = self._kv.spare_slot, inputs.token_ids[:size]
        return CapturedStep(size, spare_slot, graph, token_ids, inputs.places(size), block_tables, logits, drawn)

    def _run(
        self, size: int, largest: CapturedStep | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """The step's logits, in the memory of those of the largest step, and what a kernel draws from them."""
        program, inputs, kv = self._program, self._inputs.step_inputs(size), self._kv.tensors
        if isinstance(program, SplitProgram):
            # In float32 they would be as much memory traffic again as drawing from them.
            logits = program.logits(program.all_rows(inputs, kv), inputs, kv)
        else:
            logits = program.run(inputs, kv)
        if largest is not None:
            logits = largest.logits[:size].copy_(logits)
        return logits, None if self._draw_tokens is None else self._draw_tokens(logits, *self._inputs.drawing(size))
