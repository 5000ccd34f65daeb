"""What stays on the device from step to step: the tokens of all requests, and their block tables.

A drawn token is written into the token table on the device, and the next step reads it there. So a step
can be launched before the tokens of the step before it are known to the host.
"""

from dataclasses import dataclass

import numpy as np
import torch

from backends.model_runner.packed_arrays import Array, ArrayPacker, ArraysOnDevice, PackedArray
from backends.model_runner.request_table import BlockWrite, RequestTable, TokenWrite
from backends.model_runner.step_arrays import StepArrays
from backends.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step's arrays, in line for the device, and what the tables lack."""

    arrays: StepArrays
    places: tuple[PackedArray, ...]
    sampled_cells: PackedArray
    token_writes: tuple[PackedArray, PackedArray] | None
    block_writes: tuple[PackedArray, PackedArray] | None


class DeviceTables:
    """The device's copy of a `RequestTable`."""

    def __init__(self, table: RequestTable, device: torch.device) -> None:
        self._table = table
        self._device = device
        self.token_ids = torch.zeros(table.num_rows, table.num_token_columns, dtype=torch.int32, device=device)
        self._block_ids = torch.zeros(table.num_rows, table.num_block_columns, dtype=torch.int32, device=device)

    def pack(self, arrays: StepArrays, packer: ArrayPacker) -> PackedStep:
        """Put everything that the device needs for the step in line, and make room for it there."""
        self._fit()
        table = self._table
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
        token_writes = block_writes = None
        if table.token_writes:
            cells, values = _token_cells(table.token_writes, table.num_token_columns)
            token_writes = packer.add(cells), packer.add(values)
        if table.block_writes:
            cells, values = _block_cells(table.block_writes, table.num_block_columns)
            block_writes = packer.add(cells), packer.add(values)
        return PackedStep(arrays, places, sampled_cells, token_writes, block_writes)

    def inputs(self, step: PackedStep, packed: ArraysOnDevice) -> StepInputs:
        """The step's inputs, from the arrays on the device. Brings the tables up to date first."""
        # The host's lists are cleared only now: a step that fails before leaves them to the next one.
        if step.token_writes is not None:
            cells, values = step.token_writes
            self.token_ids.view(-1).index_copy_(0, cells.on(packed), values.on(packed))
            self._table.token_writes.clear()
        if step.block_writes is not None:
            cells, values = step.block_writes
            self._block_ids.view(-1).index_copy_(0, cells.on(packed), values.on(packed))
            self._table.block_writes.clear()
        arrays = step.arrays
        token_cells, positions, slots, starts, context_lens, rows, sampled = (place.on(packed) for place in step.places)
        num_blocks_max = -(-arrays.context_len_max // self._table.block_size)
        return StepInputs(
            token_ids=self.token_ids.view(-1).index_select(0, token_cells).to(torch.int64),
            positions=positions,
            slot_mapping=slots,
            query_starts=starts,
            context_lens=context_lens,
            block_tables=self._block_ids[:, :num_blocks_max].index_select(0, rows),
            sampled_rows=sampled,
            num_decodes=arrays.num_decodes,
            query_len_max=arrays.query_len_max,
            context_len_max=arrays.context_len_max,
        )

    def keep_drawn(self, step: PackedStep, packed: ArraysOnDevice, token_ids: torch.Tensor) -> None:
        """Make drawn tokens, [num_sampled] int32, the last ones of their sequences."""
        self.token_ids.view(-1).index_copy_(0, step.sampled_cells.on(packed), token_ids)

    def _fit(self) -> None:
        table = self._table
        self.token_ids = _grown(self.token_ids, table.num_rows, table.num_token_columns)
        self._block_ids = _grown(self._block_ids, table.num_rows, table.num_block_columns)


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
