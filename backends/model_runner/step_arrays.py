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
    sampled_cells: Array  # [num_sampled] int64: where drawn tokens go
    num_decodes: int
    query_len_max: int
    context_len_max: int


def sampled_sequences(sequences: SequenceRows) -> tuple[Array, Array]:
    """Rows of the request table, and tokens known before the draw, of sequences that get a token: [num_sampled]."""
    if sequences.samples is None:
        return sequences.rows, sequences.ends
    return sequences.rows[sequences.samples], sequences.ends[sequences.samples]


def step_arrays(table: RequestTable, sequences: SequenceRows) -> StepArrays:
    """The arrays of a step whose sequences `RequestTable.apply` gave."""
    rows, ends = sequences.rows, sequences.ends
    num_columns = table.num_token_columns
    sampled_table_rows, sampled_positions = sampled_sequences(sequences)
    query_starts = np.zeros(rows.size + 1, np.int32)
    if sequences.query_lens is None or sequences.samples is None:
        query_len_max = 1
        query_starts[1:] = np.arange(1, rows.size + 1)
        token_rows, positions, sampled_rows = rows, ends - 1, np.arange(rows.size)
    else:
        query_lens = sequences.query_lens
        query_len_max = int(query_lens.max())
        np.cumsum(query_lens, out=query_starts[1:])
        token_rows = np.repeat(rows, query_lens)
        positions = np.arange(token_rows.size) + np.repeat(ends - query_lens - query_starts[:-1], query_lens)
        sampled_rows = query_starts[1:][sequences.samples].astype(np.int64) - 1
    return StepArrays(
        table_rows=rows,
        token_cells=token_rows * num_columns + positions,
        # A sequence that is too long for the model ends with an error; until then it must do no harm.
        positions=np.minimum(positions, table.num_positions - 1),
        slot_mapping=slots(table, token_rows, positions),
        query_starts=query_starts,
        context_lens=ends.astype(np.int32),
        sampled_rows=sampled_rows,
        sampled_cells=sampled_table_rows * num_columns + sampled_positions,
        num_decodes=sequences.num_decodes,
        query_len_max=query_len_max,
        context_len_max=sequences.context_len_max,
    )


def slots(table: RequestTable, rows: Array, positions: Array) -> Array:
    """[num_tokens] int64: where the KV of tokens goes, which are at these positions of these rows."""
    block_indexes, offsets = np.divmod(positions, table.block_size)
    found: Array = table.block_tables[rows, block_indexes].astype(np.int64)
    found *= table.block_size
    found += offsets
    return found
