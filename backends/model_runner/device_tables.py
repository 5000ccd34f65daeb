"""What stays on the device from step to step: the tokens of all requests, and their block tables.

A drawn token is written into the token table on the device, and the next step reads it there. So a step
can be launched before the tokens of the step before it are known to the host.
"""

from dataclasses import dataclass

import numpy as np
import torch

from backends.model_runner.captured_inputs import NUM_PLACES, table_width
from backends.model_runner.decode_graphs import CapturedStep
from backends.model_runner.mixed_graphs import NUM_PROMPTS_MAX, CapturedMixedStep
from backends.model_runner.packed_arrays import Array, ArrayPacker, ArraysOnDevice, PackedArray
from backends.model_runner.request_table import BlockWrite, RequestTable, SequenceRows, TokenWrite
from backends.model_runner.sampler.draw_plan import KernelRows
from backends.model_runner.step_arrays import StepArrays, slots
from backends.step_inputs import StepInputs

PackedWrites = tuple[PackedArray, PackedArray]  # cells and their values
_NUM_CELLS = 3  # of input tokens, rows of the table, cells of drawn tokens
_INT64 = np.dtype(np.int64)
_INT32 = np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step's arrays, in line for the device, and what the tables lack."""

    arrays: StepArrays
    places: tuple[PackedArray, ...]
    sampled_cells: PackedArray
    token_writes: PackedWrites | None
    block_writes: PackedWrites | None


@dataclass(frozen=True, slots=True)
class PackedDecodes:
    """The same of a step that is replayed."""

    room: PackedArray  # [_NUM_CELLS + NUM_PLACES, num_seqs of the captured step] int64
    num_seqs: int
    context_len_max: int
    token_writes: PackedWrites | None
    block_writes: PackedWrites | None


@dataclass(frozen=True, slots=True)
class PackedMixed:
    """The same of a captured step with prompts."""

    arrays: StepArrays
    cells: PackedArray  # [3, num_tokens of the captured step] int64: of input tokens; positions; slots
    table_rows: PackedArray
    lengths: PackedArray  # see `MixedInputs.lengths`
    sampled_rows: PackedArray
    sampled_cells: PackedArray
    token_writes: PackedWrites | None
    block_writes: PackedWrites | None


class DeviceTables:
    """The device's copy of a `RequestTable`."""

    def __init__(self, table: RequestTable, device: torch.device) -> None:
        self._table = table
        self._device = device
        self.token_ids = torch.zeros(table.num_rows, table.num_token_columns, dtype=torch.int32, device=device)
        num_block_columns = table_width(table.num_block_columns)
        self._block_ids = torch.zeros(table.num_rows, num_block_columns, dtype=torch.int32, device=device)

    def pack(self, arrays: StepArrays, packer: ArrayPacker) -> PackedStep:
        """Put everything that the device needs for the step in line, and make room for it there."""
        places = (
            packer.add(arrays.token_cells),
            packer.add(arrays.positions),
            packer.add(arrays.slot_mapping),
            packer.add(arrays.query_starts),
            packer.add(arrays.context_lens),
            packer.add(arrays.table_rows),
            packer.add(arrays.sampled_rows),
        )
        sampled_cells = packer.add(arrays.sampled_cells)
        return PackedStep(arrays, places, sampled_cells, *self._pack_writes(packer))

    def pack_decodes(
        self, sequences: SequenceRows, captured: CapturedStep, drawing: KernelRows | None, packer: ArrayPacker
    ) -> PackedDecodes:
        """As `pack`, for a step that is replayed, and draws as ``drawing`` says; None: what it draws is not used."""
        table, rows, positions = self._table, sequences.rows, sequences.ends - 1
        num_seqs = rows.size
        room, place = packer.room((_NUM_CELLS + NUM_PLACES, captured.num_seqs), _INT64)
        room[:, num_seqs:] = 0
        room[_NUM_CELLS + 1, num_seqs:] = captured.spare_slot
        token_cells, table_rows, drawn_cells, token_positions, slot_mapping = room[: _NUM_CELLS + 2, :num_seqs]
        np.multiply(rows, table.num_token_columns, out=token_cells)
        token_cells += positions
        table_rows[:] = rows
        np.add(token_cells, 1, out=drawn_cells)
        token_positions[:] = positions
        slot_mapping[:] = slots(table, rows, positions)
        _fill_draws(room[_NUM_CELLS + 2 :, :num_seqs], drawing)
        token_writes, block_writes = self._pack_writes(packer)
        return PackedDecodes(place, num_seqs, sequences.context_len_max, token_writes, block_writes)

    def pack_mixed(self, arrays: StepArrays, captured: CapturedMixedStep, packer: ArrayPacker) -> PackedMixed:
        """As `pack`, for a captured step with prompts, in its form: see `MixedInputs`."""
        num_tokens, num_seqs, num_decodes = arrays.positions.size, arrays.table_rows.size, arrays.num_decodes
        num_decodes_max = captured.num_decodes_max
        num_seqs_max = num_decodes_max + NUM_PROMPTS_MAX
        end_prompts = num_decodes_max + num_seqs - num_decodes
        cells, cells_place = packer.room((3, captured.num_tokens), _INT64)
        cells[:, num_tokens:] = 0
        cells[2, num_tokens:] = captured.inputs.spare_slot
        cells[0, :num_tokens], cells[1, :num_tokens] = arrays.token_cells, arrays.positions
        cells[2, :num_tokens] = arrays.slot_mapping
        rows, rows_place = packer.room((num_seqs_max,), _INT64)
        rows[:] = 0
        rows[:num_decodes] = arrays.table_rows[:num_decodes]
        rows[num_decodes_max:end_prompts] = arrays.table_rows[num_decodes:]
        lengths, lengths_place = packer.room((2 * num_seqs_max + 1,), _INT32)
        starts, context_lens = lengths[: num_seqs_max + 1], lengths[num_seqs_max + 1 :]
        starts[:num_decodes] = arrays.query_starts[:num_decodes]
        starts[num_decodes:num_decodes_max] = num_decodes
        starts[num_decodes_max : end_prompts + 1] = arrays.query_starts[num_decodes:]
        starts[end_prompts + 1 :] = num_tokens
        context_lens[:] = 0
        context_lens[:num_decodes] = arrays.context_lens[:num_decodes]
        context_lens[num_decodes_max:end_prompts] = arrays.context_lens[num_decodes:]
        sampled = packer.add(arrays.sampled_rows), packer.add(arrays.sampled_cells)
        return PackedMixed(arrays, cells_place, rows_place, lengths_place, *sampled, *self._pack_writes(packer))

    def _pack_writes(self, packer: ArrayPacker) -> tuple[PackedWrites | None, PackedWrites | None]:
        self._fit()
        table = self._table
        token_writes = block_writes = None
        if table.token_writes:
            cells, values = _token_cells(table.token_writes, table.num_token_columns)
            token_writes = packer.add(cells), packer.add(values)
        if table.block_writes:
            cells, values = _block_cells(table.block_writes, self._block_ids.shape[1])
            block_writes = packer.add(cells), packer.add(values)
        return token_writes, block_writes

    def inputs(self, step: PackedStep, packed: ArraysOnDevice) -> StepInputs:
        """The step's inputs, from the arrays on the device. Brings the tables up to date first."""
        self._update(step, packed)
        arrays = step.arrays
        token_cells, positions, slots, starts, context_lens, rows, sampled = (place.on(packed) for place in step.places)
        return StepInputs(
            token_ids=self.token_ids.view(-1).index_select(0, token_cells).to(torch.int64),
            positions=positions,
            slot_mapping=slots,
            query_starts=starts,
            context_lens=context_lens,
            block_tables=self._tables_for(arrays.context_len_max).index_select(0, rows),
            sampled_rows=sampled,
            num_decodes=arrays.num_decodes,
            query_len_max=arrays.query_len_max,
            context_len_max=arrays.context_len_max,
        )

    def fill_captured(self, captured: CapturedStep, step: PackedDecodes, packed: ArraysOnDevice) -> torch.Tensor:
        """Put the step's inputs where the captured step reads them. Brings the tables up to date first.

        Where drawn tokens go: [num_seqs] int64.
        """
        self._update(step, packed)
        room = step.room.on(packed)
        captured.places.copy_(room[_NUM_CELLS:])
        torch.index_select(self.token_ids.view(-1), 0, room[0], out=captured.token_ids)
        tables = self._tables_for(step.context_len_max)
        torch.index_select(tables, 0, room[1], out=captured.block_tables[:, : tables.shape[1]])
        return room[2, : step.num_seqs]

    def fill_mixed(self, captured: CapturedMixedStep, step: PackedMixed, packed: ArraysOnDevice) -> None:
        """Put the step's inputs where the captured step reads them. Brings the tables up to date first."""
        self._update(step, packed)
        inputs, num_tokens = captured.inputs, captured.num_tokens
        cells = step.cells.on(packed)
        inputs.places(num_tokens).copy_(cells[1:])
        inputs.lengths(num_tokens).copy_(step.lengths.on(packed))
        torch.index_select(self.token_ids.view(-1), 0, cells[0], out=inputs.token_ids[:num_tokens])
        tables, rows = self._tables_for(step.arrays.context_len_max), step.table_rows.on(packed)
        torch.index_select(tables, 0, rows, out=inputs.block_tables[: rows.shape[0], : tables.shape[1]])

    def _tables_for(self, context_len_max: int) -> torch.Tensor:
        """As many columns of all block tables as the longest context has blocks, or a few more."""
        return self._block_ids[:, : table_width(-(-context_len_max // self._table.block_size))]

    def _update(self, step: PackedStep | PackedDecodes | PackedMixed, packed: ArraysOnDevice) -> None:
        # The host's lists are cleared only now: a step that fails before leaves them to the next one.
        if step.token_writes is not None:
            cells, values = step.token_writes
            self.token_ids.view(-1).index_copy_(0, cells.on(packed), values.on(packed))
            self._table.token_writes.clear()
        if step.block_writes is not None:
            cells, values = step.block_writes
            self._block_ids.view(-1).index_copy_(0, cells.on(packed), values.on(packed))
            self._table.block_writes.clear()

    def keep_drawn(self, cells: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Make drawn tokens, [num_sampled] int32, the last ones of their sequences."""
        self.token_ids.view(-1).index_copy_(0, cells, token_ids)

    def _fit(self) -> None:
        table = self._table
        self.token_ids = _grown(self.token_ids, table.num_rows, table.num_token_columns)
        self._block_ids = _grown(self._block_ids, table.num_rows, table_width(table.num_block_columns))


def _fill_draws(room: Array, drawing: KernelRows | None) -> None:
    """What `CapturedInputs.drawing` reads, [6, num_seqs] int64; None: the most likely tokens, which cost least."""
    integers, floats = room[:3], room[3:].view(np.float64)
    if drawing is None:
        room[...] = 0
        return
    integers[: len(drawing.integers)] = drawing.integers
    floats[: len(drawing.floats)] = drawing.floats
    if not drawing.has_cutoffs:
        integers[2], floats[1], floats[2] = 0, 2.0, 0


def _grown(tensor: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """The tensor with at least as many rows and columns, zeros where there was nothing."""
    if tensor.shape == (num_rows, num_columns):
        return tensor
    grown = tensor.new_zeros(num_rows, num_columns)
    grown[: tensor.shape[0], : tensor.shape[1]] = tensor
    return grown


def _token_cells(writes: list[TokenWrite], num_columns: int) -> tuple[Array, Array]:
    """Cells and values, later writes to a cell winning."""
    starts = [write.row * num_columns + write.first_position for write in writes]
    cells = [
        np.arange(start, start + write.token_ids.size, dtype=np.int64)
        for start, write in zip(starts, writes, strict=True)
    ]
    values = np.concatenate([write.token_ids for write in writes])
    return _last_of_each(np.concatenate(cells), values, [write.row for write in writes])


def _block_cells(writes: list[BlockWrite], num_columns: int) -> tuple[Array, Array]:
    starts = [write.row * num_columns + write.first_index for write in writes]
    lens = [len(write.block_ids) for write in writes]
    values = np.array([block_id for write in writes for block_id in write.block_ids], np.int32)
    cells = np.array(starts, np.int64)
    if len(values) > len(writes):
        firsts = np.cumsum([0, *lens[:-1]])
        cells = np.repeat(cells - firsts, lens) + np.arange(len(values))
    return _last_of_each(cells, values, [write.row for write in writes])


def _last_of_each(cells: Array, values: Array, rows: list[int]) -> tuple[Array, Array]:
    """Without earlier values of a cell that is written twice: a device may write in any order.

    Only a row that was written to more than once can have such cells.
    """
    if len(set(rows)) == len(rows):
        return cells, values
    _, first_from_behind = np.unique(cells[::-1], return_index=True)
    kept = cells.size - 1 - first_from_behind
    return cells[kept], values[kept]
