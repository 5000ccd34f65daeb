"""A `DrawPlan` with its arrays on the device."""

from dataclasses import dataclass

import numpy as np
import torch

from backends.model_runner.packed_arrays import Array, ArrayPacker, ArraysOnDevice, PackedArray
from backends.model_runner.sampler.draw_plan import DrawPlan, EditRows, KernelRows, LogprobRows, PenaltyRows, RandomRows


@dataclass(frozen=True, slots=True)
class DeviceRandomRows:
    """See `RandomRows`."""

    rows: torch.Tensor
    temperature: torch.Tensor
    log_min_p: torch.Tensor | None
    top_k: torch.Tensor
    top_p: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceKernelRows:
    """See `KernelRows`."""

    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DevicePenaltyRows:
    """See `PenaltyRows`."""

    places: torch.Tensor
    penalties: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceEditRows:
    """See `EditRows`."""

    limited_rows: torch.Tensor
    allowed_cells: torch.Tensor
    bias_cells: torch.Tensor
    bias_values: torch.Tensor
    banned_cells: torch.Tensor
    word_cells: torch.Tensor
    word_prefixes: torch.Tensor
    word_table_rows: torch.Tensor
    word_num_tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceDrawPlan:
    """The host's plan, and what it needs on the device."""

    host: DrawPlan
    random: DeviceRandomRows | None
    kernel: DeviceKernelRows | None
    penalties: DevicePenaltyRows | None
    edits: DeviceEditRows | None
    logprob_rows: torch.Tensor | None
    refused_rows: torch.Tensor | None


class PackedDrawPlan:
    """A plan of which the arrays are in line for the device.

    ``drawn_already``: what a kernel is told of the rows has gone another way.
    """

    def __init__(self, plan: DrawPlan, packer: ArrayPacker, *, drawn_already: bool = False) -> None:
        self._plan = plan
        self._kernel = None if plan.kernel is None or drawn_already else _pack_kernel(plan.kernel, packer)
        self._random = None if plan.random is None else _pack_random(plan.random, packer)
        self._penalties = None if plan.penalties is None else _pack_penalties(plan.penalties, packer)
        self._edits = None if plan.edits is None else _pack_edits(plan.edits, packer)
        self._logprob_rows = None if plan.logprobs is None else _pack_logprobs(plan.logprobs, packer)
        self._refused_rows = packer.add(np.array(plan.refused_rows, np.int64)) if plan.refused_rows else None

    def on(self, packed: ArraysOnDevice) -> DeviceDrawPlan:
        """The plan, once the packed arrays are on the device."""
        return DeviceDrawPlan(
            self._plan,
            None if self._random is None else DeviceRandomRows(*_views(self._random, packed)),  # type: ignore[arg-type]
            None if self._kernel is None else _kernel_on(self._kernel, packed),
            None if self._penalties is None else DevicePenaltyRows(*_views(self._penalties, packed)),  # type: ignore[arg-type]
            None if self._edits is None else DeviceEditRows(*_views(self._edits, packed)),  # type: ignore[arg-type]
            None if self._logprob_rows is None else self._logprob_rows.on(packed),
            None if self._refused_rows is None else self._refused_rows.on(packed),
        )


def _views(arrays: tuple[PackedArray | None, ...], packed: ArraysOnDevice) -> list[torch.Tensor | None]:
    return [None if array is None else array.on(packed) for array in arrays]


def _pack_random(random: RandomRows, packer: ArrayPacker) -> tuple[PackedArray | None, ...]:
    add = packer.add
    return (
        add(random.rows),
        add(random.temperature),
        None if random.log_min_p is None else add(random.log_min_p),
        add(random.top_k),
        add(random.top_p),
        add(random.keys),
    )


def _pack_kernel(rows: KernelRows, packer: ArrayPacker) -> tuple[PackedArray, PackedArray]:
    return packer.add(rows.integers), packer.add(rows.floats)


def _kernel_on(arrays: tuple[PackedArray, PackedArray], packed: ArraysOnDevice) -> DeviceKernelRows:
    seeds, positions, *top_k = arrays[0].on(packed).unbind()
    temperature, *rest = arrays[1].on(packed).unbind()
    if not top_k:
        return DeviceKernelRows(temperature, seeds, positions, None, None, None)
    return DeviceKernelRows(temperature, seeds, positions, top_k[0], *rest)


def _pack_penalties(penalties: PenaltyRows, packer: ArrayPacker) -> tuple[PackedArray, ...]:
    return packer.add(penalties.places), packer.add(penalties.penalties)


def _pack_edits(edits: EditRows, packer: ArrayPacker) -> tuple[PackedArray, ...]:
    arrays: tuple[Array, ...] = (
        edits.limited_rows,
        edits.allowed_cells,
        edits.bias_cells,
        edits.bias_values,
        edits.banned_cells,
        edits.word_cells,
        edits.word_prefixes,
        edits.word_table_rows,
        edits.word_num_tokens,
    )
    return tuple(map(packer.add, arrays))


def _pack_logprobs(logprobs: LogprobRows, packer: ArrayPacker) -> PackedArray:
    return packer.add(logprobs.rows)
