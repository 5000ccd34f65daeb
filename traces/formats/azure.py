"""The Azure LLM inference traces of 2023 (Splitwise, ISCA'24), 2024 and 2025.

Columns ``TIMESTAMP,ContextTokens,GeneratedTokens``; the 2025 trace has ``NumImages`` as well, which is
read over. Timestamps are dates: of 2023 with seven fractional digits, of 2024 with a zone.
"""

from traces.columns import requests_from_columns
from traces.formats.csv_table import CsvTable
from traces.formats.timestamps import clock_column_ns
from traces.request_trace import TraceRequest

TIME_COLUMN = "TIMESTAMP"
COLUMNS = ("ContextTokens", "GeneratedTokens")
_EXPECTED_TIME = "a time such as 2023-11-16 18:15:46.6805900 or 2024-05-10 00:00:00.009930+00:00"


def read_azure(table: CsvTable) -> tuple[tuple[TraceRequest, ...], tuple[str, ...]]:
    """Requests, and notes on what was changed. Raises TraceError at the first wrong value."""
    arrival_ns = table.times_ns(TIME_COLUMN, clock_column_ns, _EXPECTED_TIME, ordered=True)
    requests = requests_from_columns(arrival_ns, table.counts(COLUMNS[0], 1), table.counts(COLUMNS[1], 1))
    notes: tuple[str, ...] = ()
    if "NumImages" in table.columns:
        images = sum(table.counts("NumImages", 0))
        notes = (f"{images} images are not modelled beyond their share of ContextTokens",) if images else ()
    return requests, notes
