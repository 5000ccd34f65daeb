"""Qwen-Bailian traces: JSON lines with ``chat_id``, ``parent_chat_id`` (-1: a session's first turn),
``timestamp`` in seconds, ``input_length``, ``output_length``, ``type``, ``turn``, ``hash_ids`` of 16 tokens each.

Not verified on the whole files.
"""

from traces.columns import requests_from_columns
from traces.errors import TraceError
from traces.formats.json_table import JsonTable
from traces.formats.timestamps import NANOSECONDS_PER_SECOND
from traces.request_trace import TraceRequest
from traces.think_time import think_time_ns

BLOCK_SIZE = 16
FIELDS = ("chat_id", "timestamp", "input_length", "output_length")
_NO_PARENT = -1


def read_qwen_bailian(table: JsonTable) -> tuple[tuple[TraceRequest, ...], tuple[str, ...]]:
    """Requests, and notes on what was changed. Raises TraceError at the first wrong value."""
    times_ns = _times_ns(table)
    prompts = table.counts("input_length", 1)
    outputs = table.counts("output_length", 1)
    content_ids = _chained(table.id_lists("hash_ids", prompts, BLOCK_SIZE))
    previous, num_orphans = _previous(table)
    gap_ns = [
        0 if before is None else think_time_ns(times_ns[index] - times_ns[before], outputs[before])
        for index, before in enumerate(previous)
    ]
    requests = requests_from_columns(
        times_ns, prompts, outputs, content_ids=content_ids, previous=previous, gap_ns=gap_ns
    )
    notes: tuple[str, ...] = ()
    if num_orphans:
        notes = (f"{num_orphans} turns follow a turn that is not in the file: they were made first turns",)
    if num_orphans < sum(parent != _NO_PARENT for parent in table.column("parent_chat_id", _NO_PARENT)):
        notes += ("think time is the recorded gap less 100 ms for each token of the reply before: no end is recorded",)
    return requests, notes


def _times_ns(table: JsonTable) -> list[int]:
    """Nanoseconds from the first request on."""
    timestamps = table.column("timestamp")
    for row, timestamp in enumerate(timestamps):
        if type(timestamp) not in (int, float) or not 0 <= timestamp < 10**12:
            raise table.error(row, "timestamp", "a number of seconds, 0 or more")
    table.check_order("timestamp", timestamps)
    times_ns = [round(timestamp * NANOSECONDS_PER_SECOND) for timestamp in timestamps]
    return [time_ns - times_ns[0] for time_ns in times_ns]


def _previous(table: JsonTable) -> tuple[list[int | None], int]:
    """For each request the index of its parent, and how many have a parent that the file lacks."""
    index_of: dict[int, int] = {}
    previous: list[int | None] = []
    num_orphans = 0
    chat_ids = table.counts("chat_id", 0)
    parents = table.counts("parent_chat_id", _NO_PARENT, default=_NO_PARENT)
    for index, (chat_id, parent) in enumerate(zip(chat_ids, parents, strict=True)):
        before = index_of.get(parent)
        num_orphans += before is None and parent != _NO_PARENT
        previous.append(before)
        if chat_id in index_of:
            raise TraceError(
                f"{table.path}, line {table.line_numbers[index]}: chat_id is {chat_id}, as in line "
                f"{table.line_numbers[index_of[chat_id]]}, but must be of one request only"
            )
        index_of[chat_id] = index
    return previous, num_orphans


def _chained(hash_ids: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Number blocks anew so that equal ids mean equal blocks *and* equal blocks before them.

    The format does not promise that its hashes cover what stands before a block.
    """
    number_of: dict[tuple[int, int], int] = {}
    chained: list[tuple[int, ...]] = []
    for ids in hash_ids:
        before = -1
        numbers: list[int] = []
        for block in ids:
            before = number_of.setdefault((before, block), len(number_of))
            numbers.append(before)
        chained.append(tuple(numbers))
    return chained
