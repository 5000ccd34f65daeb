"""The CSV file: one row per request."""

import csv
from collections.abc import Iterator, Sequence
from typing import IO

from sagellm.core.run_metrics import RequestRecord
from sim.report.summarised_run import SummarisedRun

COLUMNS = (
    "request_id",
    "arrival_s",
    "num_prompt_tokens",
    "num_output_tokens",
    "num_cached_tokens",
    "ttft_ms",
    "tpot_ms",
    "e2el_ms",
    "prefill_instance",
    "decode_instance",
    "finish_reason",
)


def write_request_rows(file: IO[str], runs: Sequence[SummarisedRun]) -> None:
    """Write every run's requests, in order of arrival; several runs are told apart by a last column, ``cluster``.

    What is not defined for a request is left empty; a rejected request has the finish reason ``rejected``.
    """
    writer = csv.writer(file, lineterminator="\n")
    several = len(runs) > 1
    writer.writerow((*COLUMNS, "cluster") if several else COLUMNS)
    for run in runs:
        suffix = (run.cluster,) if several else ()
        writer.writerows((*row, *suffix) for row in _rows(run))


def _rows(run: SummarisedRun) -> Iterator[tuple[str | int, ...]]:
    for record in run.metrics.requests.values():
        request = record.request
        yield (
            request.request_id,
            f"{request.arrival_ns / 1e9:.9f}",
            request.num_prompt_tokens,
            record.num_output_tokens,
            record.num_cached_tokens,
            _milliseconds(record.ttft_ns),
            _milliseconds(record.tpot_ns),
            _milliseconds(record.e2el_ns),
            record.prefill_instance or "",
            record.decode_instance or "",
            _finish(record),
        )


def _finish(record: RequestRecord) -> str:
    if record.reject_reason is not None:
        return "rejected"
    return "" if record.finish_reason is None else record.finish_reason.value


def _milliseconds(value_ns: float | None) -> str:
    return "" if value_ns is None else f"{value_ns / 1e6:.6f}"
