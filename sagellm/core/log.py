"""The log of a run: every event when it was handled and every poll's effects, as JSON lines.

Line 1 is a header with all that is needed to make the same machines again. Each further line is
``[now_ns, machine, event]`` for an event that a machine handled, or ``[now_ns, machine, [effects]]``
for a poll and its effects, in their order; events and effects are objects that name their ``type``.
A run is identified by the SHA-256 of these lines.
"""

import hashlib
from collections.abc import Iterator
from typing import IO

import msgspec

from sagellm.core.config import ControlPlaneConfig, InstanceConfig
from sagellm.core.identity import InstanceId
from sagellm.core.messages import Effect, Event

LOG_SCHEMA = 3
READABLE_SCHEMAS = (2, 3)
"""In schema 2 the ends of repetitions were always listed, which they still may be."""
_RECORDS_AT_ONCE = 64  # few enough that they are still in the processor's cache


class LogError(ValueError):
    """A log that cannot be read: says which file, line, and what was expected."""


class LogHeader(msgspec.Struct, frozen=True):
    """What the machines of a run were made from."""

    cluster: str
    trace: str
    seed: int
    control_plane: ControlPlaneConfig
    instances: tuple[InstanceConfig, ...]
    schema: int = LOG_SCHEMA
    kind: str = "sagellm-log"


class HandledEvent(msgspec.Struct, frozen=True):
    """A machine handled an event."""

    now_ns: int
    machine: InstanceId
    event: Event


class Polled(msgspec.Struct, frozen=True):
    """A machine was polled and gave these effects."""

    now_ns: int
    machine: InstanceId
    effects: tuple[Effect, ...]


_Line = tuple[int, InstanceId, Event | tuple[Effect, ...]]


class LogWriter:
    """Hashes a log, and writes it where there is somewhere to write it to."""

    def __init__(self, header: LogHeader, file: IO[bytes] | None) -> None:
        self._encode_lines = msgspec.json.Encoder().encode_lines
        self._hash = hashlib.sha256()
        self._file = file
        self._lines: list[LogHeader | _Line] = [header]

    def event(self, now_ns: int, machine: InstanceId, event: Event) -> None:
        """A machine is about to handle this."""
        self._lines.append((now_ns, machine, event))

    def polled(self, now_ns: int, machine: InstanceId, effects: tuple[Effect, ...]) -> None:
        """A machine was polled and gave these."""
        self._lines.append((now_ns, machine, effects))
        if len(self._lines) >= _RECORDS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        text = self._encode_lines(self._lines)
        self._hash.update(text)
        if self._file is not None:
            self._file.write(text)
        self._lines.clear()

    def close(self) -> str:
        """Write what is left; the log's SHA-256."""
        if self._lines:
            self._flush()
        return self._hash.hexdigest()


def read_log(lines: Iterator[bytes], name: str) -> tuple[LogHeader, Iterator[HandledEvent | Polled]]:
    """The header, and the records as they are read. Raises `LogError`."""
    first = next(lines, b"")
    try:
        header = msgspec.json.decode(first, type=LogHeader)
    except msgspec.MsgspecError as error:
        raise LogError(f"{name}, line 1: not the header of a sageLLM log ({error})") from None
    if header.kind != "sagellm-log" or header.schema not in READABLE_SCHEMAS:
        known = " and ".join(str(schema) for schema in READABLE_SCHEMAS)
        raise LogError(f"{name}, line 1: schema {header.schema} of {header.kind!r}, this version reads {known}")
    return header, _records(lines, name)


def _records(lines: Iterator[bytes], name: str) -> Iterator[HandledEvent | Polled]:
    decode = msgspec.json.Decoder(_Line).decode
    for number, line in enumerate(lines, start=2):
        try:
            now_ns, machine, what = decode(line)
        except msgspec.MsgspecError as error:
            raise LogError(f"{name}, line {number}: not a log record ({error})") from None
        if isinstance(what, tuple):
            yield Polled(now_ns, machine, what)
        else:
            yield HandledEvent(now_ns, machine, what)
