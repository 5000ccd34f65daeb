"""What stays on the device from step to step: the tokens of all requests, and their block tables.

A drawn token is written into the token table on the device, and the next step reads it there. So a step
can be launched before the tokens of the step before it are known to the host.
"""

from dataclasses import dataclass

import numpy as np
import torch

from backends.model_runner.captured_inputs import NUM_PLACES, table_width
from backends.model_runner.decode_graphs import CapturedStep
from backends.model_runner.packed_arrays import Array, ArrayPacker, ArraysOnDevice, PackedArray
from backends.model_runner.request_table import BlockWrite, RequestTable, TokenWrite
from backends.model_runner.sampler.draw_plan import KernelRows
from backends.model_runner.step_arrays import StepArrays
from backends.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step's arrays, in line for the device, and what the tables lack."""

    arrays: StepArrays
    places: tuple[PackedArray, ...]  # those of `StepInputs`, or the two of a captured step
    sampled_cells: PackedArray
    token_writes: tuple[PackedArray, PackedArray] | None
    block_writes: tuple[PackedArray, PackedArray] | None


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
        return self._packed(arrays, places, packer)

    def pack_decodes(
        self, arrays: StepArrays, captured: CapturedStep, drawing: KernelRows | None, packer: ArrayPacker
    ) -> PackedStep:
        """As `pack`, for a step that is replayed, and that draws where ``drawing`` says how."""
        num_seqs = arrays.table_rows.size
        cells = np.zeros((2, captured.num_seqs), np.int64)
        cells[0, :num_seqs] = arrays.token_cells
        cells[1, :num_seqs] = arrays.table_rows
        places = np.zeros((NUM_PLACES, captured.num_seqs), np.int64)
        places[0, :num_seqs] = arrays.positions
        places[1, :num_seqs] = arrays.slot_mapping
        places[1, num_seqs:] = captured.spare_slot
        if drawing is not None:
            places[2, :num_seqs] = drawing.seeds
            places[3, :num_seqs] = drawing.positions
            places[4].view(np.float64)[:num_seqs] = drawing.temperature
        return self._packed(arrays, (packer.add(cells), packer.add(places)), packer)

    def _packed(self, arrays: StepArrays, places: tuple[PackedArray, ...], packer: ArrayPacker) -> PackedStep:
        self._fit()
        table = self._table
        sampled_cells = packer.add(arrays.sampled_cells)
        token_writes = block_writes = None
        if table.token_writes:
            cells, values = _token_cells(table.token_writes, table.num_token_columns)
            token_writes = packer.add(cells), packer.add(values)
        if table.block_writes:
            cells, values = _block_cells(table.block_writes, self._block_ids.shape[1])
            block_writes = packer.add(cells), packer.add(values)
        return PackedStep(arrays, places, sampled_cells, token_writes, block_writes)

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
            block_tables=self._tables_of(arrays).index_select(0, rows),
            sampled_rows=sampled,
            num_decodes=arrays.num_decodes,
            query_len_max=arrays.query_len_max,
            context_len_max=arrays.context_len_max,
        )

    def fill_captured(self, captured: CapturedStep, step: PackedStep, packed: ArraysOnDevice) -> None:
        """Put the step's inputs where the captured step reads them. Brings the tables up to date first."""
        self._update(step, packed)
        cells, places = (place.on(packed) for place in step.places)
        token_cells, rows = cells.unbind()
        captured.places.copy_(places)
        torch.index_select(self.token_ids.view(-1), 0, token_cells, out=captured.token_ids)
        tables = self._tables_of(step.arrays)
        torch.index_select(tables, 0, rows, out=captured.block_tables[:, : tables.shape[1]])

    def _tables_of(self, arrays: StepArrays) -> torch.Tensor:
        """As many columns of all block tables as the step's longest context has blocks, or a few more."""
        return self._block_ids[:, : table_width(-(-arrays.context_len_max // self._table.block_size))]

    def _update(self, step: PackedStep, packed: ArraysOnDevice) -> None:
        # The host's lists are cleared only now: a step that fails before leaves them to the next one.
        if step.token_writes is not None:
            cells, values = step.token_writes
            self.token_ids.view(-1).index_copy_(0, cells.on(packed), values.on(packed))
            self._table.token_writes.clear()
        if step.block_writes is not None:
            cells, values = step.block_writes
            self._block_ids.view(-1).index_copy_(0, cells.on(packed), values.on(packed))
            self._table.block_writes.clear()

    def keep_drawn(self, step: PackedStep, packed: ArraysOnDevice, token_ids: torch.Tensor) -> None:
        """Make drawn tokens, [num_sampled] int32, the last ones of their sequences."""
        self.token_ids.view(-1).index_copy_(0, step.sampled_cells.on(packed), token_ids)

    def _fit(self) -> None:
        table = self._table
        self.token_ids = _grown(self.token_ids, table.num_rows, table.num_token_columns)
        self._block_ids = _grown(self._block_ids, table.num_rows, table_width(table.num_block_columns))


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
