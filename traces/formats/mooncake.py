"""Mooncake traces (FAST'25): ``{"timestamp": ms, "input_length", "output_length", "hash_ids"}``.

One hash id for each 512 prompt tokens begun, chained: equal ids mean equal prefixes. Sessions are not
named in the format; they are only in the hashes.
"""

from itertools import pairwise
from random import Random

from traces.columns import requests_from_columns
from traces.formats.json_table import JsonTable
from traces.request_trace import TraceRequest

BLOCK_SIZE = 512
FIELDS = ("timestamp", "input_length", "output_length")
_NANOSECONDS_PER_MILLISECOND = 1_000_000
_RECORDED_WINDOW_MS = 3000  # of the published conversation trace


def read_mooncake(table: JsonTable, seed: int) -> tuple[tuple[TraceRequest, ...], tuple[str, ...]]:
    """Requests, and notes on what was changed. Raises TraceError at the first wrong value.

    Where the timestamps are those of recording windows, arrivals are spread inside these by ``seed``.
    """
    timestamps = table.counts("timestamp", 0)
    table.check_order("timestamp", timestamps)
    prompts = table.counts("input_length", 1)
    outputs = table.counts("output_length", 1)
    content_ids = table.id_lists("hash_ids", prompts, BLOCK_SIZE)
    window_ms = _window_ms(timestamps)
    notes: tuple[str, ...] = ()
    if window_ms:
        arrival_ns = _spread_ns(timestamps, window_ms, Random(seed))
        notes = (
            f"timestamps lie {window_ms} ms apart with many requests each: arrivals were spread uniformly inside "
            f"these windows, with seed {seed}",
        )
    else:
        arrival_ns = [timestamp * _NANOSECONDS_PER_MILLISECOND for timestamp in timestamps]
    start_ns = arrival_ns[0]
    arrival_ns = [arrival - start_ns for arrival in arrival_ns]
    return requests_from_columns(arrival_ns, prompts, outputs, content_ids=content_ids), notes


def _window_ms(timestamps: list[int]) -> int:
    """The width of the windows that sorted timestamps were rounded down to; 0 where they were not.

    They were where every second request or more shares its timestamp with one before it, and the
    timestamps lie a second or more apart.
    """
    distinct = list(dict.fromkeys(timestamps))
    if len(timestamps) < 2 * len(distinct):
        return 0
    if len(distinct) == 1:
        return _RECORDED_WINDOW_MS
    steps_ms = sorted(later - earlier for earlier, later in pairwise(distinct))
    width_ms = steps_ms[len(steps_ms) // 2]
    return width_ms if width_ms >= 1000 else 0


def _spread_ns(timestamps: list[int], window_ms: int, random: Random) -> list[int]:
    """Arrivals uniform inside their windows, in nanoseconds, sorted: so requests keep the file's order."""
    width_ns = window_ms * _NANOSECONDS_PER_MILLISECOND
    # A window may be a few milliseconds short of the usual; sorting keeps the order where two overlap by that.
    return sorted(
        timestamp * _NANOSECONDS_PER_MILLISECOND + int(random.random() * width_ns) for timestamp in timestamps
    )
