"""How large the tiles of attention are, and how many programs share out the keys of decodes."""

from dataclasses import dataclass, replace
from functools import cache

_DOT_ROWS_MIN = 16  # of an operand of tl.dot, and the least of the dimension that it sums over
LOG2_E = 1.4426950408889634
# Several programs on each multiprocessor, so that their loads overlap.
_PROGRAMS_PER_UNIT = 4
_LONG_CONTEXT = 2048
_HEAD_DIM_MAX = 256
# A group's heads are rows of one tile, whose result a program of four warps holds in registers.
_GROUP_COLUMNS_MAX = 64 * 128


HOPPER_ROWS = 128  # of queries in a tile of the kernel for Hopper
_HOPPER_HEAD_DIMS = (64, 128)
_HOPPER_BLOCK_SIZES = (8, 16, 32, 64)  # its shared memory is laid out in eights of rows
_SHORT_CONTEXT = 1024

PRODUCT_TILE = 64  # rows of a weight that a product of few rows takes at a time: what a group of four warps multiplies
PRODUCT_RUN = 128  # columns of them
_PRODUCT_ROWS_LEAST = 16
_SHARED_BYTES = 210 << 10  # of Hopper's 227 KiB, the rest for barriers and the order in which results are written
_WORTH_A_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class TileShape:
    """Rows of queries (tokens x heads of a group) and keys of one tile, and how its program is compiled."""

    num_rows: int
    num_keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class HopperTiles:
    """Keys of one tile, and how many tiles of keys, and as many of values, are in shared memory at a time."""

    num_keys: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ProductShape:
    """Rows that a product of few rows is filled up to, runs of a tile in shared memory at a time, and programs."""

    num_rows: int
    num_stages: int
    num_programs: int


@cache
def product_shape(num_rows: int, num_columns: int, width: int, num_compute_units: int) -> ProductShape:
    """For x [num_rows, width] and a weight [num_columns, width]: one program to each multiprocessor, or nearly.

    Where most of them can share tiles without a remainder they do: then fewer have parts of the same tile.
    """
    rows = max(_PRODUCT_ROWS_LEAST, power_of_two_from(num_rows))
    bytes_each = 2 * (PRODUCT_TILE + rows) * PRODUCT_RUN
    num_stages = (_SHARED_BYTES - 4 * PRODUCT_TILE * rows) // bytes_each
    num_tiles = -(-num_columns // PRODUCT_TILE)
    num_even = num_compute_units // num_tiles * num_tiles
    num_programs = num_even if num_even >= _WORTH_A_SHARE * num_compute_units else num_compute_units
    return ProductShape(rows, num_stages, min(num_programs, num_tiles * -(-width // PRODUCT_RUN)))


def fit_tiles(head_dim: int, group: int) -> bool:
    """Whether there are tiles for such heads, ``group`` query heads to a key-value head."""
    return head_dim <= _HEAD_DIM_MAX and power_of_two_from(group) * head_columns(head_dim) <= _GROUP_COLUMNS_MAX


def prefill_tile(
    head_dim: int, group: int, element_bytes: int, context_len_max: int, holds_large_tiles: bool
) -> TileShape:
    """Small tiles share work out more evenly, large ones, for long contexts, read keys less often.

    ``holds_large_tiles``: a program can have 165 KiB of shared memory; the others fit into 99 KiB.
    """
    if element_bytes > 2:  # without tensor cores, what a tile holds is in registers
        num_keys = 32 if head_dim <= 64 else 16
        shape = TileShape(num_rows=16, num_keys=num_keys, num_warps=4, num_stages=1)
    elif head_dim > 128:
        shape = TileShape(num_rows=64, num_keys=32, num_warps=4, num_stages=2)
    elif context_len_max <= _LONG_CONTEXT:
        shape = TileShape(num_rows=64, num_keys=64, num_warps=4, num_stages=2)
    elif not holds_large_tiles:
        shape = TileShape(num_rows=128, num_keys=64, num_warps=8, num_stages=2)
    else:
        shape = TileShape(num_rows=128, num_keys=128, num_warps=8, num_stages=2)
    return replace(shape, num_rows=max(shape.num_rows, power_of_two_from(group)))


def fit_hopper_tiles(head_dim: int, group: int, element_bytes: int, block_size: int) -> bool:
    """Whether the kernel for Hopper is for such heads and blocks."""
    fits = head_dim in _HOPPER_HEAD_DIMS and block_size in _HOPPER_BLOCK_SIZES
    return fits and element_bytes == 2 and group <= HOPPER_ROWS


def hopper_tiles(context_len_max: int) -> HopperTiles:
    """Large tiles keep the tensor cores busier, of small ones fewer keys are masked."""
    if context_len_max <= _SHORT_CONTEXT:
        return HopperTiles(num_keys=64, num_stages=4)
    return HopperTiles(num_keys=128, num_stages=3)


def decode_tile(head_dim: int, group: int, element_bytes: int) -> TileShape:
    """A group's heads are the rows. Small tiles: many programs on a multiprocessor hide more than many stages."""
    num_rows = max(_DOT_ROWS_MIN, power_of_two_from(group))
    if element_bytes > 2:
        return TileShape(num_rows, num_keys=32 if head_dim <= 64 else 16, num_warps=4, num_stages=2)
    return TileShape(num_rows, num_keys=32 if head_dim > 128 else 64, num_warps=4, num_stages=2)


def num_programs_wanted(num_compute_units: int) -> int:
    """Programs that fill the device once."""
    return _PROGRAMS_PER_UNIT * num_compute_units


def head_columns(head_dim: int) -> int:
    """Columns of a tile that holds one head; those from ``head_dim`` on are zeros."""
    return max(_DOT_ROWS_MIN, power_of_two_from(head_dim))


def power_of_two_from(number: int) -> int:
    """The least power of two that is not below ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()
