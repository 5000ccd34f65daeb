"""Plain CSV: a time in seconds, prompt tokens, output tokens. Two sets of names are known.

Vidur's ``arrived_at,num_prefill_tokens,num_decode_tokens``, and the per-request results of an online
run, ``sent_s,num_prompt_tokens,num_output_tokens``; other columns are read over.
"""

from collections.abc import Sequence

from traces.columns import requests_from_columns
from traces.formats.csv_table import CsvTable
from traces.formats.timestamps import seconds_ns
from traces.request_trace import TraceRequest

VIDUR_TIME_COLUMN = "arrived_at"
VIDUR_COLUMNS = ("num_prefill_tokens", "num_decode_tokens")
ONLINE_TIME_COLUMN = "sent_s"
ONLINE_COLUMNS = ("num_prompt_tokens", "num_output_tokens")
EXPECTED_SECONDS = "a number of seconds, 0 or more"


def seconds_column_ns(column: Sequence[str]) -> list[int | None]:
    """Each text as nanoseconds; None where it is not a number of seconds."""
    return list(map(seconds_ns, column))


def read_vidur(table: CsvTable) -> tuple[tuple[TraceRequest, ...], tuple[str, ...]]:
    """Requests, and notes on what was changed. Raises TraceError at the first wrong value."""
    arrival_ns = table.times_ns(VIDUR_TIME_COLUMN, seconds_column_ns, EXPECTED_SECONDS, ordered=True)
    prompts, outputs = table.counts(VIDUR_COLUMNS[0], 1), table.counts(VIDUR_COLUMNS[1], 1)
    return requests_from_columns(arrival_ns, prompts, outputs), ()


def read_online_run(table: CsvTable) -> tuple[tuple[TraceRequest, ...], tuple[str, ...]]:
    """Requests, and notes on what was changed. Raises TraceError at the first wrong value.

    The rows are in the order in which the client planned to send; what it did send may be a little
    out of that order, so they are sorted by ``sent_s``.
    """
    sent_ns = table.times_ns(ONLINE_TIME_COLUMN, seconds_column_ns, EXPECTED_SECONDS, ordered=False)
    prompts, outputs = table.counts(ONLINE_COLUMNS[0], 1), table.counts(ONLINE_COLUMNS[1], 1)
    order = sorted(range(len(sent_ns)), key=sent_ns.__getitem__)
    requests = requests_from_columns(
        [sent_ns[row] for row in order], [prompts[row] for row in order], [outputs[row] for row in order]
    )
    notes = () if order == list(range(len(order))) else ("rows were sorted by sent_s",)
    return requests, notes
