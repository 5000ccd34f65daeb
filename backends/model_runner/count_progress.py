"""A line on the terminal that says how far a start is; silence where nobody looks."""

import time
from typing import TextIO

_BAR_WIDTH = 30


class CountProgress:
    """Counts of one piece of work, drawn over and over where ``stream`` is a terminal."""

    def __init__(self, stream: TextIO, label: str, count: int) -> None:
        self._stream = stream if stream.isatty() else None
        self._label = label
        self._count = count
        self._num_done = 0
        self._begin_s = time.monotonic()
        self._draw()

    def advance(self) -> None:
        """One more is done."""
        self._num_done += 1
        self._draw()

    def end(self, outcome: str = "") -> float:
        """Nothing more is done, and ``outcome`` is what has come of it. Seconds that it took."""
        duration_s = time.monotonic() - self._begin_s
        self._draw(f", {duration_s:.1f} s{outcome}\n")
        return duration_s

    def _draw(self, end: str = "") -> None:
        if self._stream is not None:
            bar = ("#" * (_BAR_WIDTH * self._num_done // max(1, self._count))).ljust(_BAR_WIDTH, ".")
            self._stream.write(f"\r{self._label} [{bar}] {self._num_done} / {self._count}{end}")
            self._stream.flush()
