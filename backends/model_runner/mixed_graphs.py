"""Small steps with prompts, decodes among them or not, captured up to where sampled rows are selected.

A graph is made for a number of tokens, whoever they belong to: how many sequences decode, where each prompt begins
and how far it has come is read on the device. What comes after, for the rows that get a token, is launched. Large
steps keep the device busy for longer than the host takes to launch them.
"""

from dataclasses import dataclass, replace
from typing import TextIO

import torch

from backends.base import HardwareBackend
from backends.model_runner.batch_sizes import mixed_sizes
from backends.model_runner.captured_inputs import table_width
from backends.model_runner.graph_set import GraphSet
from backends.model_runner.kv_blocks import KVBlocks
from backends.step_inputs import ModelProgram, SplitProgram, StepInputs
from backends.streams import DeviceGraph

NUM_PROMPTS_MAX = 16
_NUM_PLACES = 2


@dataclass(frozen=True, slots=True)
class CapturedMixedStep:
    """A graph and the memory that belongs to its number of tokens."""

    num_tokens: int
    num_decodes_max: int
    graph: DeviceGraph
    inputs: "MixedInputs"
    step_inputs: StepInputs  # as they were captured
    hidden: tuple[torch.Tensor, ...]  # of all rows: see `SplitProgram`


class MixedInputs:
    """Where captured steps with prompts find their inputs. All sizes share the memory."""

    def __init__(
        self,
        num_tokens_max: int,
        num_seqs_max: int,
        num_positions: int,
        block_size: int,
        spare_slot: int,
        device: torch.device,
    ) -> None:
        self.spare_slot = spare_slot  # where rows write that only fill the step up
        self._num_seqs_max = num_seqs_max
        self._num_positions = num_positions
        num_slots = min(num_tokens_max, num_seqs_max) + NUM_PROMPTS_MAX
        num_blocks_max = table_width(-(-num_positions // block_size))
        self.token_ids = torch.zeros(num_tokens_max, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_slots, num_blocks_max, dtype=torch.int32, device=device)
        self._places = torch.zeros(_NUM_PLACES * num_tokens_max, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(2 * num_slots + 1, dtype=torch.int32, device=device)
        self._no_rows = torch.zeros(0, dtype=torch.int64, device=device)

    def num_decodes_max(self, num_tokens: int) -> int:
        """Sequences at the front that may decode."""
        return min(num_tokens, self._num_seqs_max)

    def places(self, num_tokens: int) -> torch.Tensor:
        """[2, num_tokens] int64: positions, and slots."""
        return self._places[: _NUM_PLACES * num_tokens].view(_NUM_PLACES, num_tokens)

    def lengths(self, num_tokens: int) -> torch.Tensor:
        """[2 * num_seqs + 1] int32: where each sequence's rows begin, and where the last one's end; context lengths."""
        return self._lengths[: 2 * (self.num_decodes_max(num_tokens) + NUM_PROMPTS_MAX) + 1]

    def fill_up(self, num_tokens: int) -> None:
        """One prompt of so many tokens that is nobody's."""
        places, lengths = self.places(num_tokens).zero_(), self.lengths(num_tokens).zero_()
        torch.arange(num_tokens, out=places[0]).clamp_(max=self._num_positions - 1)
        places[1].fill_(self.spare_slot)
        self.token_ids.zero_()
        self.block_tables.zero_()
        num_decodes = self.num_decodes_max(num_tokens)
        num_seqs = num_decodes + NUM_PROMPTS_MAX
        lengths[num_decodes + 1 : num_seqs + 1] = num_tokens
        lengths[num_seqs + 1 + num_decodes] = num_tokens

    def step_inputs(self, num_tokens: int) -> StepInputs:
        """The step's inputs; what is worked out here is worked out again when the step is replayed."""
        num_decodes = self.num_decodes_max(num_tokens)
        num_seqs = num_decodes + NUM_PROMPTS_MAX
        positions, slots = self.places(num_tokens)
        lengths = self.lengths(num_tokens)
        return StepInputs(
            token_ids=self.token_ids[:num_tokens].to(torch.int64),
            positions=positions,
            slot_mapping=slots,
            query_starts=lengths[: num_seqs + 1],
            context_lens=lengths[num_seqs + 1 :],
            block_tables=self.block_tables[:num_seqs],
            sampled_rows=self._no_rows,
            num_decodes=num_decodes,
            query_len_max=num_tokens,
            context_len_max=self._num_positions,
            decode_count=lengths[num_decodes : num_decodes + 1],
        )


class MixedGraphs:
    """The captured steps of one model on one device."""

    def __init__(
        self, program: ModelProgram, kv: KVBlocks, num_positions: int, backend: HardwareBackend, device_index: int
    ) -> None:
        self._program = program if isinstance(program, SplitProgram) else None
        self._kv = kv
        self._num_positions = num_positions
        self._device = backend.torch_device(device_index)
        self.graphs: GraphSet[CapturedMixedStep] = GraphSet("mixed", "tokens", backend, device_index)

    def capture(self, num_tokens_max: int, num_seqs_max: int, terminal: TextIO) -> None:
        """Capture steps of up to so many tokens. What is captured writes to nobody's block only."""
        program = self._program
        if program is None:
            return
        sizes = mixed_sizes(min(num_tokens_max, self._num_positions))

        def make_maker() -> "_MixedMaker":
            block_size, spare_slot = self._kv.tensors.block_size, self._kv.spare_slot
            inputs = MixedInputs(sizes[-1], num_seqs_max, self._num_positions, block_size, spare_slot, self._device)
            return _MixedMaker(program, self._kv, inputs)

        self.graphs.capture(sizes, make_maker, terminal)

    def logits(self, captured: CapturedMixedStep, sampled_rows: torch.Tensor, context_len_max: int) -> torch.Tensor:
        """What comes after the graph, launched: logits of these rows [num_sampled, vocab_size] float32."""
        assert self._program is not None, "nothing was captured"
        inputs = captured.step_inputs
        num_columns = table_width(-(-context_len_max // self._kv.tensors.block_size))
        tables = inputs.block_tables[:, :num_columns]
        inputs = replace(inputs, sampled_rows=sampled_rows, block_tables=tables, context_len_max=context_len_max)
        return self._program.logits(captured.hidden, inputs, self._kv.tensors).float()

    def step_for(self, num_tokens: int, num_prompts: int, context_len_max: int) -> CapturedMixedStep | None:
        """The captured step that such a step fits into; None where it is to be launched operator by operator."""
        if num_prompts > NUM_PROMPTS_MAX or context_len_max > self._num_positions:
            return None
        return self.graphs.smallest(num_tokens)


class _MixedMaker:
    """A `StepMaker`."""

    def __init__(self, program: SplitProgram, kv: KVBlocks, inputs: MixedInputs) -> None:
        self._program = program
        self._kv = kv
        self._inputs = inputs

    def fill_up(self, size: int) -> None:
        self._inputs.fill_up(size)

    def run(self, size: int) -> None:
        self._program.all_rows(self._inputs.step_inputs(size), self._kv.tensors)

    def capture(self, size: int, graph: DeviceGraph, largest: CapturedMixedStep | None) -> CapturedMixedStep:
        inputs = self._inputs
        with graph.capture():
            step_inputs = inputs.step_inputs(size)
            hidden = self._program.all_rows(step_inputs, self._kv.tensors)
            if largest is not None:
                # In the memory of the largest step's: of 40 sizes each its own would be half a GiB.
                pairs = zip(largest.hidden, hidden, strict=True)
                hidden = tuple(kept[:size].copy_(tensor) for kept, tensor in pairs)
        return CapturedMixedStep(size, inputs.num_decodes_max(size), graph, inputs, step_inputs, hidden)
