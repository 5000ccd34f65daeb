"""The integers of one step, as arrays in the form that a device is to have them."""

from dataclasses import dataclass

import numpy as np

from backends.model_runner.packed_arrays import Array
from backends.model_runner.request_table import RequestTable, SequenceRows


@dataclass(frozen=True, slots=True)
class StepArrays:
    """See `StepInputs`; ``*_cells`` are row * num_token_columns + position, of the token table."""

    table_rows: Array  # [num_seqs] int64
    token_cells: Array  # [num_tokens] int64: where this step's input tokens are
    positions: Array  # [num_tokens] int64
    slot_mapping: Array  # [num_tokens] int64
    query_starts: Array  # [num_seqs + 1] int32
    context_lens: Array  # [num_seqs] int32
    sampled_rows: Array  # [num_sampled] int64
    sampled_table_rows: Array  # [num_sampled] int64
    sampled_positions: Array  # [num_sampled] int64: of the drawn tokens in their sequences
    sampled_cells: Array  # [num_sampled] int64: where they go
    num_decodes: int
    query_len_max: int
    context_len_max: int


def step_arrays(table: RequestTable, sequences: SequenceRows) -> StepArrays:
    """The arrays of a step whose sequences `RequestTable.apply` gave."""
    rows, query_lens = sequences.rows, sequences.query_lens
    num_columns = table.num_token_columns
    ends = sequences.first_positions + query_lens
    query_starts = np.zeros(rows.size + 1, np.int32)
    np.cumsum(query_lens, out=query_starts[1:])
    if rows.size == sequences.num_decodes:
        token_rows, positions = rows, sequences.first_positions
        sampled_rows, sampled_table_rows, sampled_positions = np.arange(rows.size), rows, ends
    else:
        token_rows = np.repeat(rows, query_lens)
        positions = np.arange(token_rows.size) + np.repeat(sequences.first_positions - query_starts[:-1], query_lens)
        samples = sequences.samples
        sampled_rows = query_starts[1:][samples].astype(np.int64) - 1
        sampled_table_rows, sampled_positions = rows[samples], ends[samples]
    block_indexes, offsets = np.divmod(positions, table.block_size)
    block_ids = table.block_tables[token_rows, block_indexes].astype(np.int64)
    return StepArrays(
        table_rows=rows,
        token_cells=token_rows * num_columns + positions,
        # A sequence that is too long for the model ends with an error; until then it must do no harm.
        positions=np.minimum(positions, table.num_positions - 1),
        slot_mapping=block_ids * table.block_size + offsets,
        query_starts=query_starts,
        context_lens=ends.astype(np.int32),
        sampled_rows=sampled_rows,
        sampled_table_rows=sampled_table_rows,
        sampled_positions=sampled_positions,
        sampled_cells=sampled_table_rows * num_columns + sampled_positions,
        num_decodes=sequences.num_decodes,
        query_len_max=int(query_lens.max()),
        context_len_max=int(ends.max()),
    )
