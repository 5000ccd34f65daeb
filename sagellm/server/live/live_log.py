"""The log of a live run, in the format of `sagellm.core.log`: what happened can be replayed offline.

Every machine's records are in the order in which they happened. Records of different machines stand in
the order in which the front heard of them, which keeps causes before their effects.
"""

import logging
from contextlib import suppress
from time import monotonic
from typing import IO

import msgspec

from sagellm.core.identity import InstanceId
from sagellm.core.log import LogHeader
from sagellm.core.messages import Effect, Event

_FLUSH_EVERY_S = 0.2
_FLUSH_BYTES = 1 << 20
_LOG = logging.getLogger(__name__)


class LogLines:
    """Records of one machine as lines of the log, until somebody takes them."""

    def __init__(self, machine: InstanceId) -> None:
        self._machine = machine
        self._encode_lines = msgspec.json.Encoder().encode_lines
        self._records: list[tuple[int, InstanceId, Event | tuple[Effect, ...]]] = []

    def event(self, now_ns: int, event: Event) -> None:
        """The machine is about to handle this."""
        self._records.append((now_ns, self._machine, event))

    def polled(self, now_ns: int, effects: tuple[Effect, ...]) -> None:
        """The machine was polled and gave these."""
        self._records.append((now_ns, self._machine, effects))

    def take(self) -> bytes:
        """All lines since the last call."""
        if not self._records:
            return b""
        lines = self._encode_lines(self._records)
        self._records.clear()
        return lines


class LiveLog:
    """Writes whole lines, a few times a second: what a crash loses is the last of them.

    A log that cannot be written is given up, so that serving goes on.
    """

    def __init__(self, file: IO[bytes], header: LogHeader) -> None:
        self._file = file
        self._waiting = bytearray(msgspec.json.encode(header) + b"\n")
        self._flushed_s = 0.0
        self._is_given_up = False
        self._flush()

    def write(self, lines: bytes) -> None:
        """Add whole lines."""
        if self._is_given_up:
            return
        self._waiting += lines
        if len(self._waiting) > _FLUSH_BYTES or monotonic() - self._flushed_s > _FLUSH_EVERY_S:
            self._flush()

    def close(self) -> None:
        """Write what is left. The file stays open: it is the caller's."""
        self._flush()

    def _flush(self) -> None:
        if self._waiting and not self._is_given_up:
            try:
                self._file.write(self._waiting)
                self._file.flush()
            except OSError as error:
                self._is_given_up = True
                with suppress(OSError):
                    self._file.close()  # what it holds back it cannot write either
                _LOG.error("the log ends here, for it cannot be written: %s", error.strerror or error)
            self._waiting.clear()
        self._flushed_s = monotonic()
