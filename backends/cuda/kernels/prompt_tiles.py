"""Which rows of prompts a tile of queries holds, worked out once for all layers of a step, on the device.

A sequence of n rows has at most n // tokens_per_tile + 1 tiles. Giving each sequence that many places lets a place
find its sequence by bisection of ``query_starts``; places that stay empty come last.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from backends.cuda.kernels.kernel_launcher import KernelLauncher

_PLACES = 64  # of a program


@dataclass(frozen=True, slots=True)
class PromptTiles:
    """The tiles of a step's prompts, those that see the most keys first."""

    tiles: torch.Tensor  # [num_places, 4] int32: first row in the step, rows from there on, its position, sequence
    num_tiles: torch.Tensor  # [1] int32, of the places; the others are empty
    tokens_per_tile: int

    @property
    def num_places(self) -> int:
        return self.tiles.shape[0]


@triton.jit
def _sequences_of(places, query_starts, base, num_seqs, TOKENS: tl.constexpr):
    """The last sequence whose places begin at or before each of ``places``."""
    low, high = places * 0, places * 0 + num_seqs
    num_left = num_seqs
    while num_left > 1:
        middle = (low + high) // 2
        begins_before = (tl.load(query_starts + middle) - base) // TOKENS + middle <= places
        is_open = high - low > 1
        low = tl.where(is_open & begins_before, middle, low)
        high = tl.where(is_open & (begins_before == 0), middle, high)
        num_left = (num_left + 1) // 2
    return low


@triton.jit
def _tiles_at(places, query_starts, context_lens, base, num_seqs, num_places, TOKENS: tl.constexpr):
    """What `PromptTiles.tiles` says of places, and after how many keys they end: after none where they are empty."""
    sequences = _sequences_of(places, query_starts, base, num_seqs, TOKENS)
    first_rows = tl.load(query_starts + sequences)
    num_rows = tl.load(query_starts + sequences + 1) - first_rows
    tokens = (places - ((first_rows - base) // TOKENS + sequences)) * TOKENS
    positions = tl.load(context_lens + sequences) - num_rows + tokens
    num_left = tl.where(places < num_places, num_rows - tokens, 0)
    # Rows of nobody's have positions below zero.
    end_keys = tl.where(num_left > 0, tl.maximum(positions + tl.minimum(num_left, TOKENS), 0), 0)
    return first_rows + tokens, num_left, positions, sequences, end_keys


@KernelLauncher
@triton.jit(
    do_not_specialize=["num_seqs", "num_places"],
    do_not_specialize_on_alignment=["query_starts", "context_lens"],
)
def _lay_out(
    query_starts, context_lens, tiles, num_tiles, num_seqs, num_places, TOKENS: tl.constexpr, PLACES: tl.constexpr
):
    """A tile's rank is the number of places that come before it."""
    base = tl.load(query_starts)
    lanes = tl.arange(0, PLACES)
    places = tl.program_id(0) * PLACES + lanes
    rows, num_left, positions, sequences, end_keys = _tiles_at(
        places, query_starts, context_lens, base, num_seqs, num_places, TOKENS
    )
    ranks, total = lanes * 0, 0
    for first in range(0, num_places, PLACES):
        others = first + lanes
        _, _, _, _, other_ends = _tiles_at(others, query_starts, context_lens, base, num_seqs, num_places, TOKENS)
        sees_more = other_ends[None, :] > end_keys[:, None]
        is_before = (other_ends[None, :] == end_keys[:, None]) & (others[None, :] < places[:, None])
        ranks += tl.sum((sees_more | is_before).to(tl.int32), 1)
        total += tl.sum((other_ends > 0).to(tl.int32), 0)
    inside = places < num_places
    tl.store(tiles + 4 * ranks, rows, mask=inside)
    tl.store(tiles + 4 * ranks + 1, num_left, mask=inside)
    tl.store(tiles + 4 * ranks + 2, positions, mask=inside)
    tl.store(tiles + 4 * ranks + 3, sequences, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(num_tiles, total)


def lay_out_tiles(
    query_starts: torch.Tensor, context_lens: torch.Tensor, num_rows_max: int, tokens_per_tile: int
) -> PromptTiles:
    """Tiles of sequences whose rows ``query_starts`` [num_seqs + 1] tells, at most ``num_rows_max`` in all."""
    num_seqs = context_lens.shape[0]
    num_places = num_rows_max // tokens_per_tile + num_seqs
    tiles = torch.empty(num_places, 4, dtype=torch.int32, device=context_lens.device)
    num_tiles = torch.empty(1, dtype=torch.int32, device=context_lens.device)
    _lay_out(
        (-(-num_places // _PLACES), 1, 1),
        (query_starts, context_lens, tiles, num_tiles, num_seqs, num_places),
        (tokens_per_tile, _PLACES),
    )
    return PromptTiles(tiles, num_tiles, tokens_per_tile)
