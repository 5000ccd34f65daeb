"""The log of a run: every event when it was handled and every poll's effects, as JSON lines.

Line 1 is a header with all that is needed to make the same machines again. Each further line is
``{"t": now_ns, "m": machine, "k": kind, "v": {...}}`` for an event that a machine handled, or
``{"t": now_ns, "m": machine, "p": [[kind, {...}], ...]}`` for a poll and its effects, in their order.
A run is identified by the SHA-256 of these lines.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, get_args

import msgspec

from sagellm.core.config import ControlPlaneConfig, InstanceConfig
from sagellm.core.identity import InstanceId
from sagellm.core.messages import Effect, Event

LOG_SCHEMA = 1
_LINES_AT_ONCE = 512

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (*get_args(Event), *get_args(Effect))}


class LogError(ValueError):
    """A log that cannot be read: says which file, line, and what was expected."""


@dataclass(frozen=True, slots=True)
class LogHeader:
    """What the machines of a run were made from."""

    cluster: str
    trace: str
    seed: int
    control_plane: ControlPlaneConfig
    instances: tuple[InstanceConfig, ...]
    schema: int = LOG_SCHEMA
    kind: str = "sagellm-log"


@dataclass(frozen=True, slots=True)
class HandledEvent:
    now_ns: int
    machine: InstanceId
    event: Event


@dataclass(frozen=True, slots=True)
class Polled:
    now_ns: int
    machine: InstanceId
    effects: tuple[Effect, ...]


class LogWriter:
    """Hashes a log, and writes it where there is somewhere to write it to."""

    def __init__(self, header: LogHeader, file: IO[bytes] | None) -> None:
        self._encode = msgspec.json.Encoder().encode
        self._hash = hashlib.sha256()
        self._file = file
        self._lines: list[bytes] = [self._encode(header)]

    def event(self, now_ns: int, machine: InstanceId, event: Event) -> None:
        """A machine is about to handle this."""
        self._put(self._encode({"t": now_ns, "m": machine, "k": type(event).__name__, "v": event}))

    def polled(self, now_ns: int, machine: InstanceId, effects: Sequence[Effect]) -> None:
        """A machine was polled and gave these."""
        named = [(type(effect).__name__, effect) for effect in effects]
        self._put(self._encode({"t": now_ns, "m": machine, "p": named}))

    def _put(self, line: bytes) -> None:
        self._lines.append(line)
        if len(self._lines) >= _LINES_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._lines.append(b"")
        text = b"\n".join(self._lines)
        self._hash.update(text)
        if self._file is not None:
            self._file.write(text)
        self._lines = []

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
    if header.kind != "sagellm-log" or header.schema != LOG_SCHEMA:
        raise LogError(f"{name}, line 1: schema {header.schema} of {header.kind!r}, this version reads {LOG_SCHEMA}")
    return header, _records(lines, name)


def _records(lines: Iterator[bytes], name: str) -> Iterator[HandledEvent | Polled]:
    for number, line in enumerate(lines, start=2):
        try:
            yield _record(msgspec.json.decode(line))
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            raise LogError(f"{name}, line {number}: not a log record ({error!s})") from None


def _record(fields: dict[str, Any]) -> HandledEvent | Polled:
    now_ns, machine = int(fields["t"]), InstanceId(fields["m"])
    if "k" in fields:
        return HandledEvent(now_ns, machine, msgspec.convert(fields["v"], _KINDS[fields["k"]]))
    effects: tuple[Effect, ...] = tuple(msgspec.convert(value, _KINDS[kind]) for kind, value in fields["p"])
    return Polled(now_ns, machine, effects)
