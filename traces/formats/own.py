"""Our own form: JSON lines, a header and then one request a line.

The header is ``{"format": "sagellm-trace", "schema": 1, "name", "content_block_size", "source", "notes",
"num_requests"}``. A request has the fields of ``TraceRequest``; those at their defaults may be left out.
"""

import json
from typing import Any

from traces.columns import requests_from_columns
from traces.errors import TraceError
from traces.formats.json_table import JsonTable
from traces.request_trace import Trace, TraceRequest

FORMAT = "sagellm-trace"
SCHEMA = 1
_HEADER_TYPES = {"name": str, "content_block_size": int, "source": str, "notes": list, "num_requests": int}
_REQUEST_FIELDS = frozenset(TraceRequest.__slots__)


def own_lines(trace: Trace) -> list[str]:
    """The lines of the file, without their ends. Fields at their defaults are left out of a request."""
    header = {
        "format": FORMAT,
        "schema": SCHEMA,
        "name": trace.name,
        "content_block_size": trace.content_block_size,
        "source": trace.source,
        "notes": list(trace.notes),
        "num_requests": len(trace.requests),
    }
    return [json.dumps(header), *(json.dumps(_record(request)) for request in trace.requests)]


def _record(request: TraceRequest) -> dict[str, Any]:
    record: dict[str, Any] = {
        "arrival_ns": request.arrival_ns,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_output_tokens": request.num_output_tokens,
    }
    if request.content_ids:
        record["content_ids"] = request.content_ids
    if request.priority:
        record["priority"] = request.priority
    if request.previous is not None:
        record["previous"] = request.previous
    if request.gap_ns:
        record["gap_ns"] = request.gap_ns
    return record


def read_own(table: JsonTable) -> Trace:
    """The trace that was written. Raises TraceError at the first wrong value."""
    header = _checked_header(table)
    body = JsonTable(table.path, table.records[1:], table.line_numbers[1:])
    num_requests = len(body.records)
    if not num_requests:
        raise TraceError(f"{table.path}: there is no request below the header, but a trace must have one or more")
    if header.get("num_requests", num_requests) != num_requests:
        raise TraceError(
            f"{table.path}: {num_requests} requests, but the header's num_requests is {header['num_requests']}; "
            f"is the file cut off?"
        )
    requests = _requests(body, header.get("content_block_size", 0))
    return Trace(
        name=header.get("name", ""),
        requests=requests,
        content_block_size=header.get("content_block_size", 0),
        source=header.get("source", ""),
        notes=tuple(header.get("notes", ())),
    )


def _checked_header(table: JsonTable) -> dict[str, Any]:
    header = table.records[0]
    if header.get("schema") != SCHEMA:
        raise table.error(0, "schema", f"{SCHEMA}, the only version that is known")
    for name, kind in _HEADER_TYPES.items():
        if name in header and type(header[name]) is not kind:
            raise table.error(0, name, f"a JSON value of type {kind.__name__}")
    if header.get("content_block_size", 0) < 0:
        raise table.error(0, "content_block_size", "0 or more")
    if not all(isinstance(note, str) for note in header.get("notes", ())):
        raise table.error(0, "notes", "a list of texts")
    return header


def _requests(body: JsonTable, content_block_size: int) -> tuple[TraceRequest, ...]:
    for row, record in enumerate(body.records):
        if not record.keys() <= _REQUEST_FIELDS:
            name = next(name for name in record if name not in _REQUEST_FIELDS)
            raise TraceError(
                f"{body.path}, line {body.line_numbers[row]}: {name!r} is no field of a request, but must be one of "
                f"{', '.join(TraceRequest.__slots__)}"
            )
    arrival_ns = body.counts("arrival_ns", 0)
    body.check_order("arrival_ns", arrival_ns)
    num_prompt_tokens = body.counts("num_prompt_tokens", 1)
    with_content = [row for row, record in enumerate(body.records) if record.get("content_ids")]
    if with_content and not content_block_size:
        raise body.error(with_content[0], "content_ids", "left out where the header's content_block_size is 0")
    content_ids = body.id_lists("content_ids", num_prompt_tokens, content_block_size)
    priority = body.column("priority", 0)
    previous = body.column("previous")
    for row in range(len(priority)):
        if type(priority[row]) is not int:
            raise body.error(row, "priority", "a whole number")
        before = previous[row]
        if before is not None and (type(before) is not int or not 0 <= before < row):
            raise body.error(row, "previous", f"null or the index of an earlier request, 0 to {row - 1}")
    return requests_from_columns(
        arrival_ns,
        num_prompt_tokens,
        body.counts("num_output_tokens", 1),
        content_ids=content_ids,
        priority=priority,
        previous=previous,
        gap_ns=body.counts("gap_ns", 0, default=0),
    )
