"""A bar on the terminal while big weights are loaded; silence where nobody looks."""

from typing import Protocol, TextIO

_BIG_BYTES = 1 << 30
_BAR_WIDTH = 30


class Progress(Protocol):
    """Is told how far a piece of work is."""

    def begin(self, num_bytes: int) -> None:
        """So many bytes are to do."""

    def advance(self, num_bytes: int) -> None:
        """So many more are done."""

    def end(self) -> None:
        """All is done."""


class NoProgress:
    """Tells nobody."""

    def begin(self, num_bytes: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def end(self) -> None:
        pass


class ProgressBar:
    """One line, drawn over and over, of loads of a gibibyte and more."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self._stream = stream
        self._label = label
        self._num_bytes = 0
        self._done_bytes = 0
        self._shown_percent = -1

    def begin(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self.advance(0)

    def advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        percent = 100 * self._done_bytes // max(1, self._num_bytes)
        if self._num_bytes < _BIG_BYTES or percent == self._shown_percent:
            return
        self._shown_percent = percent
        bar = ("#" * (percent * _BAR_WIDTH // 100)).ljust(_BAR_WIDTH, ".")
        done, whole = self._done_bytes / 1e9, self._num_bytes / 1e9
        self._stream.write(f"\r{self._label} [{bar}] {done:.1f} / {whole:.1f} GB")
        self._stream.flush()

    def end(self) -> None:
        if self._shown_percent >= 0:
            self._stream.write("\n")
            self._stream.flush()


def progress_on(stream: TextIO, label: str) -> Progress:
    """A bar where ``stream`` is a terminal, nothing where it is a file or a pipe."""
    return ProgressBar(stream, label) if stream.isatty() else NoProgress()
