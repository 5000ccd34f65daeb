"""Where captured decode steps find their inputs: memory that stays in place from step to step."""

import torch

from backends.step_inputs import StepInputs

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
        self._places = torch.zeros(2 * num_seqs_max, dtype=torch.int64, device=device)
        self._query_starts = torch.arange(num_seqs_max + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(num_seqs_max, device=device)

    def places(self, num_seqs: int) -> torch.Tensor:
        """[2, num_seqs] int64: positions and slots of a step of so many rows. All sizes share the memory."""
        return self._places[: 2 * num_seqs].view(2, num_seqs)

    def fill_up(self, num_seqs: int) -> None:
        """Nothing but rows that are of no account."""
        positions, slots = self.places(num_seqs)
        positions.zero_()
        slots.fill_(self._spare_slot)
        self.token_ids[:num_seqs].zero_()

    def step_inputs(self, num_seqs: int) -> StepInputs:
        """The step's inputs; what is worked out here is worked out again when the step is replayed."""
        positions, slots = self.places(num_seqs)
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


def table_width(num_blocks: int) -> int:
    """Columns of a block table for so many blocks: a kernel is compiled anew for widths that divide less evenly."""
    return -(-num_blocks // _TABLE_WIDTH_MULTIPLE) * _TABLE_WIDTH_MULTIPLE
