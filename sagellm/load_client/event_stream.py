"""Server-sent events out of the pieces in which they arrive (WHATWG HTML, section 9.2, "Server-sent events")."""

BUFFER_BYTES_MAX = 16 << 20


class MalformedStreamError(Exception):
    """What came back is not what the protocol allows. The message says what it was."""


class EventStreamParser:
    """Takes bytes as they arrive and gives the data of each event that is complete.

    Lines end with LF or CRLF. Comments and fields other than ``data`` are passed over.
    """

    __slots__ = ("_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The data of events that these bytes complete.

        Raises:
            MalformedStreamError: a line is longer than any event can be.
        """
        lines = (self._rest + received).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > BUFFER_BYTES_MAX:
            raise MalformedStreamError(f"an event of more than {BUFFER_BYTES_MAX >> 20} MiB")
        events: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif self._data and line in (b"", b"\r"):
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data.clear()
        return events
