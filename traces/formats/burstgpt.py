"""BurstGPT: ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``.

Newer releases add ``Session ID,Elapsed time``: the conversation that a request belongs to, and the
seconds until its whole response was there, so that the think time before a follow-up is known.
Not verified on the whole files.
"""

from traces.columns import requests_from_columns
from traces.formats.csv_table import CsvTable
from traces.formats.plain import EXPECTED_SECONDS, seconds_column_ns
from traces.formats.timestamps import seconds_ns
from traces.request_trace import TraceRequest

TIME_COLUMN = "Timestamp"
COLUMNS = ("Request tokens", "Response tokens")
SESSION_COLUMN = "Session ID"
ELAPSED_COLUMN = "Elapsed time"


def read_burstgpt(table: CsvTable) -> tuple[tuple[TraceRequest, ...], tuple[str, ...]]:
    """Requests, and notes on what was changed. Raises TraceError at the first wrong value.

    A row with 0 response tokens is a failure of the recorded service; it is left out.
    """
    arrival_ns = table.times_ns(TIME_COLUMN, seconds_column_ns, EXPECTED_SECONDS, ordered=True)
    prompts, outputs = table.counts(COLUMNS[0], 0), table.counts(COLUMNS[1], 0)
    kept = [row for row, count in enumerate(outputs) if count]
    for row in kept:
        if prompts[row] < 1:
            raise table.error(row, COLUMNS[0], "a whole number of 1 or more where there is a response")
    if not kept:
        raise table.error(0, COLUMNS[1], "1 or more in at least one row: all rows are failures")
    previous, gap_ns = _sessions(table, arrival_ns, kept)
    requests = requests_from_columns(
        [arrival_ns[row] - arrival_ns[kept[0]] for row in kept],
        [prompts[row] for row in kept],
        [outputs[row] for row in kept],
        previous=previous,
        gap_ns=gap_ns,
    )
    num_dropped = len(outputs) - len(kept)
    notes = (f"{num_dropped} failed requests (0 response tokens) were left out",) if num_dropped else ()
    return requests, notes


def _sessions(table: CsvTable, arrival_ns: list[int], kept: list[int]) -> tuple[list[int | None], list[int]]:
    """For each kept row, the index of the one before it in its session, and the think time between."""
    if SESSION_COLUMN not in table.columns or ELAPSED_COLUMN not in table.columns:
        return [None] * len(kept), [0] * len(kept)
    session_ids, elapsed = table.columns[SESSION_COLUMN], table.columns[ELAPSED_COLUMN]
    latest: dict[str, int] = {}
    previous: list[int | None] = []
    gap_ns: list[int] = []
    for index, row in enumerate(kept):
        session_id = session_ids[row].strip()
        before = latest.get(session_id) if session_id else None
        latest[session_id] = index
        previous.append(before)
        if before is None:
            gap_ns.append(0)
            continue
        elapsed_ns = seconds_ns(elapsed[kept[before]].strip())
        if elapsed_ns is None:
            raise table.error(kept[before], ELAPSED_COLUMN, EXPECTED_SECONDS)
        gap_ns.append(max(0, arrival_ns[row] - arrival_ns[kept[before]] - elapsed_ns))
    return previous, gap_ns
