"""Where captured decode steps find their inputs: memory that stays in place from step to step."""

import torch

from backends.step_inputs import StepInputs

NUM_PLACES = 8
_TABLE_WIDTH_MULTIPLE = 16


class CapturedInputs:
    """Inputs of up to ``num_seqs_max`` sequences with one token each.

    Rows that only fill a batch up are at position 0 and write to ``spare_slot``, which is nobody's; what they
    read, and what comes out for them, is of no account.
    """

    def __init__(
        self, num_seqs_max: int, num_positions: int, block_size: int, spare_slot: int, device: torch.device
    ) -> None:
        self.num_positions = num_positions
        self._spare_slot = spare_slot
        num_blocks_max = table_width(-(-num_positions // block_size))
        self.token_ids = torch.zeros(num_seqs_max, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros(num_seqs_max, num_blocks_max, dtype=torch.int32, device=device)
        self._places = torch.zeros(NUM_PLACES * num_seqs_max, dtype=torch.int64, device=device)
        self._query_starts = torch.arange(num_seqs_max + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(num_seqs_max, device=device)

    def places(self, num_seqs: int) -> torch.Tensor:
        """[NUM_PLACES, num_seqs] int64, of a step of so many rows. All sizes share the memory.

        Positions, slots, and what drawing takes: seeds, positions in the output, top_k, and the bits of temperature,
        top_p and min_p in float64, which has all that float32 has.
        """
        return self._places[: NUM_PLACES * num_seqs].view(NUM_PLACES, num_seqs)

    def fill_up(self, num_seqs: int) -> None:
        """Nothing but rows that are of no account."""
        places = self.places(num_seqs).zero_()
        places[1].fill_(self._spare_slot)
        self.token_ids[:num_seqs].zero_()

    def step_inputs(self, num_seqs: int) -> StepInputs:
        """The step's inputs; what is worked out here is worked out again when the step is replayed."""
        positions, slots = self.places(num_seqs)[:2]
        return StepInputs(
            token_ids=self.token_ids[:num_seqs].to(torch.int64),
            positions=positions,
            slot_mapping=slots,
            query_starts=self._query_starts[: num_seqs + 1],
            context_lens=(positions + 1).to(torch.int32),
            block_tables=self.block_tables[:num_seqs],
            sampled_rows=self._rows[:num_seqs],
            num_decodes=num_seqs,
            query_len_max=1,
            context_len_max=self.num_positions,
        )

    def drawing(self, num_seqs: int) -> tuple[torch.Tensor, ...]:
        """What a `DrawTokens` wants of rows that may be cut off, in its order."""
        seeds, positions, top_k = self.places(num_seqs)[2:5].unbind()
        temperature, top_p, min_p = self.places(num_seqs)[5:].view(torch.float64).to(torch.float32).unbind()
        return temperature, seeds, positions, top_k, top_p, min_p


def table_width(num_blocks: int) -> int:
    """Columns of a block table for so many blocks: a kernel is compiled anew for widths that divide less evenly."""
    return -(-num_blocks // _TABLE_WIDTH_MULTIPLE) * _TABLE_WIDTH_MULTIPLE
