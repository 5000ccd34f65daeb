"""Reading a trace file of any known form. The form is recognised by its content, not by its name."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

from traces.errors import TraceError
from traces.formats import azure, burstgpt, mooncake, own, plain, qwen_bailian
from traces.formats.csv_table import CsvTable, header_of, parse_csv
from traces.formats.json_table import JsonTable, parse_json_lines
from traces.request_trace import Trace, TraceRequest

_Contents = tuple[tuple[TraceRequest, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _CsvForm:
    name: str
    time_column: str
    columns: tuple[str, ...]
    read: Callable[[CsvTable], _Contents]


_CSV_FORMS = (
    _CsvForm("Azure", azure.TIME_COLUMN, azure.COLUMNS, azure.read_azure),
    _CsvForm("BurstGPT", burstgpt.TIME_COLUMN, burstgpt.COLUMNS, burstgpt.read_burstgpt),
    _CsvForm("plain CSV", plain.VIDUR_TIME_COLUMN, plain.VIDUR_COLUMNS, plain.read_vidur),
    _CsvForm("online run", plain.ONLINE_TIME_COLUMN, plain.ONLINE_COLUMNS, plain.read_online_run),
)


def read_trace(path: str | os.PathLike[str], *, seed: int) -> Trace:
    """Read a trace of a known form.

    ``seed`` is for what a form leaves open and a reader must guess (``Trace.notes`` says what).
    Arrivals are counted from the first request, but for our own form, which is read as it was written.

    Raises:
        TraceError: the file cannot be read, has no known form, or has a wrong value; one sentence.
    """
    name = os.fspath(path)
    text = _read_text(name)
    if not text or text.isspace():
        raise TraceError(f"{name}: the file is empty, but must be a trace: {known_forms()}")
    if text[:1] == "{" or text.lstrip()[:1] == "{":
        return _read_json(name, text, seed)
    return _read_csv(name, text)


def known_forms() -> str:
    """The forms that ``read_trace`` knows, for help and errors."""
    csv_forms = [f"{form.name} CSV ({','.join((form.time_column, *form.columns))})" for form in _CSV_FORMS]
    return ", ".join(csv_forms).replace("CSV CSV", "CSV") + (
        f", Mooncake JSON lines ({','.join(mooncake.FIELDS)},hash_ids), Qwen-Bailian JSON lines "
        f"({','.join(qwen_bailian.FIELDS)},parent_chat_id,hash_ids), or JSON lines written by sagellm"
    )


def _read_text(name: str) -> str:
    try:
        with open(name, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise TraceError(f"{name}: there is no such file; give the path of a trace or a generator's name") from None
    except IsADirectoryError:
        raise TraceError(f"{name}: this is a directory, but must be a trace file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"{name}: the file cannot be read: {reason}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TraceError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8 text, but a trace must be text; "
            f"unpack the file first if it is compressed"
        ) from None


def _read_csv(name: str, text: str) -> Trace:
    header = header_of(text.lstrip() if text[:1].isspace() else text)
    for form in _CSV_FORMS:
        if not set(form.columns) <= set(header):
            continue
        if form.time_column not in header:
            raise TraceError(
                f"{name}: the column {form.time_column} is missing, but a {form.name} trace must have it: "
                f"without it there are no arrival times"
            )
        if len(set(header)) != len(header):
            raise TraceError(f"{name}: a column stands twice in {','.join(header)}, but each must stand once")
        requests, notes = form.read(parse_csv(name, text))
        return Trace(name=PurePath(name).stem, requests=requests, source=name, notes=notes)
    shown = ",".join(header)[:100]
    raise TraceError(f"{name}: the columns {shown!r} are of no known trace; known are {known_forms()}")


def _read_json(name: str, text: str, seed: int) -> Trace:
    table = parse_json_lines(name, text)
    fields = table.records[0].keys()
    if "format" in fields:
        if table.records[0]["format"] != own.FORMAT:
            raise table.error(0, "format", repr(own.FORMAT))
        return own.read_own(table)
    if not fields & {"timestamp", "input_length", "output_length"}:
        shown = ",".join(fields)[:100]
        raise TraceError(f"{name}: the fields {shown!r} are of no known trace; known are {known_forms()}")
    if "chat_id" in fields:
        return _json_trace(name, table, qwen_bailian.BLOCK_SIZE, qwen_bailian.read_qwen_bailian(table))
    return _json_trace(name, table, mooncake.BLOCK_SIZE, mooncake.read_mooncake(table, seed))


def _json_trace(name: str, table: JsonTable, block_size: int, contents: _Contents) -> Trace:
    requests, notes = contents
    has_content = any(request.content_ids for request in requests)
    return Trace(
        name=PurePath(name).stem,
        requests=requests,
        content_block_size=block_size if has_content else 0,
        source=table.path,
        notes=notes,
    )
