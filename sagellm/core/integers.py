"""Long columns of integers, kept in little memory."""

from __future__ import annotations

from array import array
from struct import pack
from typing import Final, TypeAlias

import numpy as np

_PENDING_MAX: Final = 256  # few enough that they are still in the processor's first cache when they are packed

_Packed: TypeAlias = "bytes | array[int]"
"""Integers of eight bytes each."""
Table: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.int64]]"


class Integers:
    """A long column of integers: appended to as a list, kept packed, eight bytes each.

    What is packed stays where it is: one array that grows would be copied again and again.
    """

    __slots__ = ("_packed", "pending")

    def __init__(self) -> None:
        self.pending: list[int] = []
        self._packed: list[_Packed] = []

    def extend(self, values: tuple[int, ...]) -> None:
        self.pending.extend(values)
        if len(self.pending) > _PENDING_MAX:
            self._pack()

    def to_array(self) -> array[int]:
        """All integers so far."""
        self._pack()
        integers = array("q")
        for index, some in enumerate(self._packed):
            integers.frombytes(memoryview(some).cast("B"))
            self._packed[index] = b""  # so that they are never there twice as a whole
        self._packed[:] = [integers]
        return integers

    def to_table(self, num_columns: int) -> Table:
        """The same, in rows."""
        return np.frombuffer(self.to_array(), np.int64).reshape(-1, num_columns)

    def _pack(self) -> None:
        self._packed.append(pack(f"{len(self.pending)}n", *self.pending))
        self.pending.clear()
